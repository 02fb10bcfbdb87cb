"""Validation gradients: one vector per task, from SFT rows (LESS) or chosen / rejected pairs (ROSE).

Losses of a pair, with logπ(y|x) = Σ_t log π(y_t | x, y_<t) over the supervised tokens, Δ = log-ratio margin against the
reference, and u = −∇(logπ(y_w|x) − logπ(y_l|x)):

    sft          mean-token NLL of the chosen side                       LESS
    dpo          −log σ(β·Δ),  Δ = (logπ − logπ_ref)(y_w) − (logπ − logπ_ref)(y_l)
                 gradient = β·σ(−β·Δ) · u                                ROSE, arXiv 2412.00631
    margin       −(logπ(y_w) − logπ(y_l)): gradient u, every pair alike
    mean_margin  the same with mean-token log-probabilities (length-normalised, as in SimPO)

β·σ(−β·Δ) is one positive number for the whole pair: u is computed with weight 1 and the number applied afterwards in
log space, so no pair underflows. It matters only for `normalise="task"`:

    pair   v_j = mean over the task's pairs of u / ‖u‖: ⟨Γ, v_j⟩ / ‖Γ‖ is the mean of cosines (the released code);
           β and the reference cancel, and the reference pass is left out
    task   v_j = Σ weight·u, to unit length: the cosine with the task's mean gradient (the formula's expectation)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset.errors import ModelError, RecipeError, did_you_mean
from keepset.features.gradients import mean_weights, recording, run_rows, sum_weights
from keepset.features.recorded import Recorder, products
from keepset.memory import in_halves
from keepset.model.layout import Places
from keepset.model.pack import Row, has_adapter, pack, plan_batches, row_sums, token_nll

FACTS = ("tasks", "margin", "log_weight", "norms")
TargetLoss = Literal["sft", "dpo", "margin", "mean_margin"]
Reference = Literal["base", "checkpoint", "none"]
PAIR_NUMBERS = 1 << 27
"""Most numbers of pair gradients held at once (512 MiB); one pair always is."""


@dataclass(frozen=True)
class GradientTarget:
    """Target vectors and what is known of the pairs behind them.

    Attributes:
        blocks: parameter name to (j, …shape) float32.
        tasks: (m,) task of each pair.
        margin: (m,) float64 logπ(y_w) − logπ(y_l) under the model, summed over tokens; NaN for `sft`.
        log_weight: (m,) float64 log of the pair's weight; log(β·σ(−β·Δ)) for `dpo` normalised per task, else 0.
        norms: (m,) float64 ‖u‖; a pair with 0 (its sides are equal) is left out of its task's mean.
    """

    blocks: dict[str, Tensor]
    tasks: np.ndarray
    margin: np.ndarray
    log_weight: np.ndarray
    norms: np.ndarray

    @property
    def n_targets(self) -> int:
        """Number of vectors, j."""
        return int(next(iter(self.blocks.values())).shape[0])

    @property
    def empty(self) -> np.ndarray:
        """(j,) bool: vectors that are zero, as none of the task's pairs has a gradient."""
        squares = sum(b.flatten(1).double().square().sum(1) for b in self.blocks.values())
        assert isinstance(squares, Tensor)
        return (squares == 0).cpu().numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as named arrays, to be written to disk; see `from_arrays`."""
        facts = {k: getattr(self, k) for k in FACTS}
        return {**facts, **{f"block.{n}": b.cpu().numpy() for n, b in self.blocks.items()}}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray], device: torch.device | str = "cpu") -> GradientTarget:
        """The target whose `arrays` these are."""
        blocks = {
            k.removeprefix("block."): torch.from_numpy(a).to(device)
            for k, a in arrays.items()
            if k.startswith("block.")
        }
        return GradientTarget(blocks, **{k: arrays[k] for k in FACTS})

    def check(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Refuse to be used with other matrices than these.

        Raises:
            ModelError: names or shapes differ.
        """
        mine = {n: tuple(b.shape[1:]) for n, b in self.blocks.items()}
        if mine != shapes:
            odd = next(iter(set(mine.items()) ^ set(shapes.items())))[0]
            raise ModelError(f"the target vectors were formed for other matrices than the rows' gradients: see '{odd}'")


def concatenate(targets: Sequence[GradientTarget]) -> GradientTarget:
    """Put several targets of the same matrices side by side, so that one pass over the rows serves them all."""
    first, shift, tasks = targets[0], 0, []
    for target in targets:
        target.check({n: (int(b.shape[1]), int(b.shape[2])) for n, b in first.blocks.items()})
        tasks.append(target.tasks + shift)
        shift += target.n_targets
    return GradientTarget(
        {n: torch.cat([t.blocks[n] for t in targets]) for n in first.blocks},
        np.concatenate(tasks),
        *(np.concatenate([getattr(t, k) for t in targets]) for k in ("margin", "log_weight", "norms")),
    )


class _PairSink:
    """Adds up the gradients of each pair's sides (the sign stands in the loss weights)."""

    def __init__(self, shapes: dict[str, tuple[int, int]], n_pairs: int, pair_of: Tensor, device: torch.device) -> None:
        self.grads = {n: torch.zeros(n_pairs, *shape, device=device) for n, shape in shapes.items()}
        self.pair_of = pair_of

    def __call__(self, name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        out = torch.empty(len(places.lengths), left.shape[1], right.shape[1], device=left.device)
        self.grads[name].index_add_(0, self.pair_of, products(left, right, places, out), alpha=scale)

    def norms(self) -> Tensor:
        """(n_pairs,) float64."""
        return torch.stack([g.flatten(1).norm(dim=1).double() for g in self.grads.values()]).norm(dim=0)


class _TaskSums:
    """Each task's Σ weight·gradient / ‖gradient‖ over its pairs, kept relative to the task's largest weight so far.

    Attributes:
        blocks: parameter name to (n_tasks, a, b) float32.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], n_tasks: int, device: torch.device) -> None:
        self.blocks = {n: torch.zeros(n_tasks, *shape, device=device) for n, shape in shapes.items()}
        self.top = np.full(n_tasks, -np.inf)

    def add(self, task: int, grads: dict[str, Tensor], norm: float, log_weight: float | None) -> None:
        """Add one pair's gradient of length `norm`; without a weight each pair counts alike."""
        factor = 1.0 / norm
        if log_weight is not None:
            if log_weight > self.top[task]:
                for block in self.blocks.values():
                    block[task].mul_(math.exp(self.top[task] - log_weight))
                self.top[task] = log_weight
            factor = math.exp(log_weight - self.top[task])
        for name, block in self.blocks.items():
            block[task].add_(grads[name], alpha=factor)

    def divided(self, n_pairs: np.ndarray | None) -> dict[str, Tensor]:
        """The sums over the number of each task's pairs (n_tasks,); without it each at length 1. In place."""
        lengths = torch.stack([b.flatten(1).norm(dim=1).double() for b in self.blocks.values()]).norm(dim=0)
        divisor = lengths.cpu().numpy() if n_pairs is None else n_pairs
        divisor = np.where(divisor > 0, divisor, 1)
        for block in self.blocks.values():
            block.div_(torch.as_tensor(divisor, dtype=block.dtype, device=block.device)[:, None, None])
        return self.blocks


def target_vectors(
    model: nn.Module,
    pairs: Sequence[tuple[Row, Row | None]],
    tasks: np.ndarray,
    *,
    n_tasks: int | None = None,
    loss: str = "dpo",
    beta: float = 0.1,
    reference: str = "base",
    normalise: str = "pair",
    token_budget: int = 1024,
    matrices: Sequence[str] | None = None,
    last_layers: int | None = None,
) -> GradientTarget:
    """Form one target vector per task at one checkpoint, from plain (unmapped) gradients.

    Args:
        model: a PeftModel with the checkpoint's LoRA, or a bare model with `matrices`; in eval mode.
        pairs: (chosen, rejected) encoded rows; rejected may be None for `sft`.
        tasks: (m,) task number of each pair, 0..n_tasks−1; tasks may have different numbers of pairs.
        n_tasks: number of tasks; default: the largest number + 1.
        loss: `sft`, `dpo`, `margin` or `mean_margin`.
        beta: DPO's β.
        reference: DPO's reference model: `base` (adapter off), `checkpoint` (the model itself: Δ = 0) or `none`.
        normalise: `pair` or `task`.
        token_budget: tokens a batch of pairs holds.
        matrices: globs of full weight matrices to use instead of LoRA.
        last_layers: only the top so many layers' matrices.

    Returns:
        The vectors; ‖v_j‖ ≤ 1, with equality for `task`.

    Raises:
        RecipeError: unknown option, or a pair loss for a row without a rejected side.
        ModelError: matrices that can't be served, no adapter for `base`, or a gradient that isn't finite.
    """
    _check_options(loss, reference, normalise, beta)
    task = np.asarray(tasks, dtype=np.int64)
    _check_pairs(pairs, task, loss)
    j = int(task.max()) + 1 if n_tasks is None else n_tasks
    weighted = loss == "dpo" and normalise == "task"
    if weighted and reference == "base" and not has_adapter(model):
        raise ModelError("reference 'base' is the model with its adapter off, and this model has none; use 'none'")
    device = next(model.parameters()).device
    margin, log_weight, norms = np.full(len(pairs), np.nan), np.zeros(len(pairs)), np.zeros(len(pairs))
    with recording(model, matrices=matrices, last_layers=last_layers) as recorder:
        shapes = recorder.shapes
        sums = _TaskSums(shapes, j, device)

        def add(indices: np.ndarray) -> None:
            rows = [side for i in indices for side in (pairs[i][:1] if loss == "sft" else pairs[i])]
            sides = 1 if loss == "sft" else 2
            sink = _PairSink(shapes, len(indices), torch.arange(len(rows), device=device) // sides, device)
            nll, row_of = run_rows(model, recorder, rows, partial(_weights, loss), sink)
            if loss != "sft":
                margin[indices] = _margin(nll, row_of, len(rows))
            if weighted:
                delta = margin[indices] - _reference_margin(model, recorder, rows, reference, margin[indices])
                log_weight[indices] = math.log(beta) + F.logsigmoid(torch.from_numpy(-beta * delta)).numpy()
            norms[indices] = sink.norms().cpu().numpy()
            if not np.isfinite(norms[indices]).all():
                raise ModelError(f"target pair {int(indices[~np.isfinite(norms[indices])][0])}: gradient is not finite")
            # from here on nothing takes memory: a batch that is halved has added nothing yet
            for k, i in enumerate(indices):
                if norms[i] > 0:
                    weight = float(log_weight[i]) if normalise == "task" else None
                    sums.add(int(task[i]), {n: g[k] for n, g in sink.grads.items()}, float(norms[i]), weight)

        for batch in _plan(pairs, loss, token_budget, sum(a * b for a, b in shapes.values())):
            in_halves(batch, add)
    blocks = sums.divided(np.bincount(task[norms > 0], minlength=j) if normalise == "pair" else None)
    return GradientTarget(blocks, task, margin, log_weight, norms)


def _check_pairs(pairs: Sequence[tuple[Row, Row | None]], task: np.ndarray, loss: str) -> None:
    if len(pairs) == 0 or len(task) != len(pairs):
        raise RecipeError(f"{len(pairs)} target pairs with {len(task)} task labels: nothing to aim at")
    if loss != "sft" and any(rejected is None for _, rejected in pairs):
        raise RecipeError(f"target loss '{loss}' needs chosen and rejected sides; rows with one side take loss 'sft'")


def _check_options(loss: str, reference: str, normalise: str, beta: float) -> None:
    for what, value, choices in (
        ("target loss", loss, get_args(TargetLoss)),
        ("reference", reference, get_args(Reference)),
        ("normalise", normalise, ("pair", "task")),
    ):
        if value not in choices:
            raise RecipeError(
                f"unknown {what} '{value}'{did_you_mean(value, list(choices))}; known: {', '.join(choices)}"
            )
    if not beta > 0:
        raise RecipeError(f"beta {beta}: must be above 0")


def _plan(pairs: Sequence[tuple[Row, Any]], loss: str, token_budget: int, p: int) -> Iterator[np.ndarray]:
    """Batches of pairs under the token budget, and few enough that their gradients fit."""
    lengths = [len(c.input_ids) + (0 if loss == "sft" else len(r.input_ids)) for c, r in pairs]
    most = max(1, PAIR_NUMBERS // p)
    for indices in plan_batches(lengths, token_budget):
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


def _weights(loss: str, row_of: Tensor, n: int) -> Tensor:
    """(S,) loss weights; rows alternate chosen, rejected for the pair losses."""
    weights = (mean_weights if loss in ("sft", "mean_margin") else sum_weights)(row_of, n)
    return weights if loss == "sft" else torch.where(row_of % 2 == 0, weights, -weights)


def _margin(nll: Tensor, row_of: Tensor, n: int) -> np.ndarray:
    """logπ(y_w) − logπ(y_l) of each pair, (n / 2,) float64."""
    sums = row_sums(nll, row_of, n).cpu().numpy()
    return sums[1::2] - sums[0::2]


def _reference_margin(
    model: Any, recorder: Recorder, rows: Sequence[Row], reference: str, policy: np.ndarray
) -> np.ndarray | float:
    if reference == "none":
        return 0.0
    if reference == "checkpoint":
        return policy
    with torch.no_grad(), _adapter_off(model):
        batch = pack(rows, np.arange(len(rows)), packed=recorder.packed, device=recorder.anchor.device)
        return _margin(token_nll(model, batch), batch.row_of, len(rows))


@contextmanager
def _adapter_off(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, which would leave the adapter's `requires_grad` set afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():
        yield
    for p, flag in before:
        p.requires_grad_(flag)
