"""Dots and norms of mapped per-example gradients against target vectors, streamed: nothing of size n × p is stored.

For each row z with g(z) = gradient of its mean-token loss, Γ the map of `features/adam.py` and v_j the target vectors:

    dots[i, j] = ⟨Γ(z_i), v_j⟩      norms[i] = ‖Γ(z_i)‖

Every gradient method (LESS, ROSE, TracIn) is a reduction of these. As each layer's backward produces the rows' factors,
its gradients are formed for all rows of the batch in blocks that stay in cache, mapped in place, multiplied into the
dots and forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from keepset.features.adam import AdamState, ParameterMap, check_map, momentum_direction, parameter_map
from keepset.features.gradients import mean_weights, recording, run_rows
from keepset.features.losses import row_losses
from keepset.features.recorded import products
from keepset.features.sketch import Sketch
from keepset.features.targets import GradientTarget
from keepset.memory import in_halves
from keepset.model.layout import Places
from keepset.model.pack import Row, engine, on_device, plan_batches
from keepset.model.pair_losses import pair_loss

BLOCK = 1 << 20
"""Gradient numbers formed, mapped and reduced at once (4 MiB, twice with the scratch: they stay in cache)."""


@dataclass(frozen=True)
class Influence:
    """What one pass over rows gives, each in the order of the rows.

    Attributes:
        dots: (n, j) float64, ⟨Γ, v_j⟩.
        norms: (n,) float64, ‖Γ‖.
        momentum: (n,) float64, cosine of Γ with the term all rows share (Γ of a zero gradient); 0 for maps without.
        grad_norms: (n,) float64, ‖g‖ before the map; 0 marks a row whose gradient vanishes.
        loss: (n,) float64, mean-token loss in nats.
        sketch: (n, k) float32, random projection of Γ, where one was asked for.
    """

    dots: np.ndarray
    norms: np.ndarray
    momentum: np.ndarray
    grad_norms: np.ndarray
    loss: np.ndarray
    sketch: np.ndarray | None = None

    @property
    def zero(self) -> np.ndarray:
        """(n,) bool: rows without any gradient; what is mapped then is the momentum alone."""
        return self.grad_norms == 0


class Reducer:
    """A `Sink` that maps each block of gradients and adds its dots, squared norms, momentum dots and sketch."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        target: GradientTarget | None,
        adam: AdamState | None,
        map: str,
        device: torch.device,
        sketch: Sketch | None = None,
        sides: int = 1,
    ) -> None:
        check_map(map, adam)
        if target is not None:
            target.check(shapes)
        self.maps: dict[str, ParameterMap] = {n: parameter_map(map, adam, n, s, device) for n, s in shapes.items()}
        self.vectors = {} if target is None else {n: target.blocks[n].flatten(1).to(device) for n in shapes}
        self.shared = {n: momentum_direction(m) for n, m in self.maps.items()}
        squares = [s.double().square().sum() for s in self.shared.values() if s is not None]
        self.shared_norm = float(np.sqrt(sum(torch.stack(squares).tolist()))) if squares else 0.0
        self.n_targets = 0 if target is None else target.n_targets
        self.buffer = torch.empty(BLOCK, device=device)
        self.scratch = torch.empty(BLOCK, device=device)
        self.device = device
        self.sketch = sketch
        self.sides = sides  # rows that make one example, standing side by side: their gradients are added up
        self.start(0)

    def start(self, n: int) -> None:
        """Begin a batch of n examples."""
        self.sums = torch.zeros(n, self.n_targets + 3, dtype=torch.float64, device=self.device)
        self.sketches = None if self.sketch is None else torch.zeros(n, self.sketch.dim, device=self.device)

    def __call__(self, name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        """Add one parameter's share."""
        n, a, b = len(places.lengths), left.shape[1], right.shape[1]
        if self.buffer.numel() < n * b:
            self.buffer, self.scratch = (torch.empty(n * b, device=self.device) for _ in range(2))
        if scale != 1.0:
            left, right = (left * scale, right) if a <= b else (left, right * scale)
        mapping, vectors, shared = self.maps[name], self.vectors.get(name), self.shared[name]
        step = max(1, self.buffer.numel() // (n * b))
        for first in range(0, a, step):
            last = min(first + step, a)
            start, stop = first * b, last * b
            out = self.buffer[: n * (stop - start)].view(n, last - first, b)
            g = products(left[:, first:last], right, places, out).view(n, stop - start)
            if self.sides > 1:
                g = g.view(n // self.sides, self.sides, stop - start).sum(1)
            self.sums[:, -1] += row_squares(g)
            g = mapping.apply_(g, self.scratch, start, stop)
            self.sums[:, -2] += row_squares(g)
            if vectors is not None:
                self.sums[:, : self.n_targets] += g @ vectors[:, start:stop].T
            if shared is not None:
                self.sums[:, -3] += g @ shared[start:stop]
            if self.sketch is not None and self.sketches is not None:
                self.sketch.add_(self.sketches, name, g, start)


def row_squares(g: Tensor) -> Tensor:
    """Sum of squares of each row of (n, p), (n,)."""
    return torch.linalg.vecdot(g, g)


def influence(
    model: nn.Module,
    rows: Sequence[Row],
    target: GradientTarget | None,
    *,
    adam: AdamState | None = None,
    map: str = "adam",
    token_budget: int = 1024,
    matrices: Sequence[str] | None = None,
    last_layers: int | None = None,
    sketch: Sketch | None = None,
) -> Influence:
    """Compute dots, norms and momentum shares of rows at one checkpoint.

    Args:
        model: a PeftModel with the checkpoint's LoRA, or a bare model with `matrices`; in eval mode.
        rows: encoded rows, each with at least one supervised token.
        target: vectors of `target_vectors` for the same matrices; None: norms (and sketches) alone.
        adam: the checkpoint's moments; `sgd` and `sign` need none.
        map: `sgd`, `adam`, `adam-less`, `precondition` or `sign`.
        token_budget: tokens a batch holds; changes the time, not the numbers.
        matrices: globs of full weight matrices to use instead of LoRA.
        last_layers: only the top so many layers' matrices; the target must have been formed so too.
        sketch: also return this random projection of every mapped gradient.

    Raises:
        ModelError: matrices that can't be served, or moments or targets of other matrices.
        RecipeError: unknown map, or no moments for it.
    """
    device = next(model.parameters()).device
    with recording(model, matrices=matrices, last_layers=last_layers) as recorder:
        sink = Reducer(recorder.shapes, target, adam, map, device, sketch)
        table = torch.zeros(len(rows), sink.n_targets + 4, dtype=torch.float64, device=device)
        projected = torch.zeros(len(rows) if sketch else 0, sketch.dim if sketch else 0, device=device)

        def score(indices: np.ndarray) -> None:
            n = len(indices)
            sink.start(n)
            nll, row_of = run_rows(model, recorder, [rows[i] for i in indices], mean_weights, sink)
            losses = sink.sums.new_zeros(n).index_add_(0, row_of, (nll * mean_weights(row_of, n)).double())
            where = on_device(indices, device)
            table[where] = torch.cat([sink.sums, losses[:, None]], 1)
            if sink.sketches is not None:
                projected[where] = sink.sketches

        for batch in plan_batches([len(r.input_ids) for r in rows], token_budget, engine(model).apart):
            in_halves(batch, score)
    return finish(sink, table.cpu().numpy(), None if sketch is None else projected.cpu().numpy())


def finish(sink: Reducer, values: np.ndarray, sketch: np.ndarray | None = None) -> Influence:
    """What the sums (n, j + 4) of dots, momentum dot, both squared norms and loss say."""
    j, norms = sink.n_targets, np.sqrt(values[:, -3])
    scale = norms * sink.shared_norm
    return Influence(
        dots=values[:, :j].copy(),
        norms=norms,
        momentum=np.divide(values[:, j], scale, out=np.zeros_like(norms), where=scale > 0),
        grad_norms=np.sqrt(values[:, -2]),
        loss=values[:, -1].copy(),
        sketch=sketch,
    )


def pair_influence(
    model: nn.Module,
    pairs: Sequence[tuple[Row, ...]],
    target: GradientTarget | None,
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    adam: AdamState | None = None,
    map: str = "adam",
    token_budget: int = 1024,
    last_layers: int | None = None,
) -> Influence:
    """`influence` of preference pairs, each with the gradient of its own pair loss against the base as reference.

    A pair loss looks at the model through ℓ_w and ℓ_l, the summed log-probabilities of its sides. So its gradient is
    a_w·∇ℓ_w + a_l·∇ℓ_l with two numbers a = ∂loss/∂ℓ (for DPO −β·σ(−β·Δ) and its negative), which two passes without
    gradient give, under the checkpoint and under the base. The third pass forms both sides' gradients, weighted, and
    adds them up before the map.

    `loss` is one of `keepset.model.pair_losses.NAMES`; the adapter, switched off, leaves the reference. All else as
    `influence`.

    Returns:
        As `influence`, one entry a pair; `loss` is the pair loss in nats.
    """
    device = next(model.parameters()).device
    rows = [side for pair in pairs for side in pair]
    measured = row_losses(model, rows, token_budget=token_budget, adapters=(False, True))
    values, slopes = pair_slopes(loss, -measured.nll[1], -measured.nll[0], measured.n_tokens, beta)
    with recording(model, last_layers=last_layers) as recorder:
        sink = Reducer(recorder.shapes, target, adam, map, device, sides=2)
        table = torch.zeros(len(pairs), sink.n_targets + 4, dtype=torch.float64, device=device)

        def score(indices: np.ndarray) -> None:
            sink.start(len(indices))
            slope = on_device(-slopes[indices].reshape(-1).astype(np.float32), device)
            run_rows(model, recorder, [s for i in indices for s in pairs[i]], lambda row_of, n: slope[row_of], sink)
            table[on_device(indices, device)] = torch.cat([sink.sums, on_device(values[indices, None], device)], 1)

        for batch in plan_batches([len(w.input_ids) + len(l.input_ids) for w, l in pairs], token_budget):
            in_halves(batch, score)
    return finish(sink, table.cpu().numpy())


def pair_slopes(
    loss: str, policy: np.ndarray, reference: np.ndarray, n_tokens: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,) of a pair loss and its slopes ∂loss/∂ℓ (n, 2), from the sides' summed log-probabilities (2n,)."""
    ours, theirs, counts = (torch.as_tensor(x, dtype=torch.float64).view(-1, 2) for x in (policy, reference, n_tokens))
    ours = ours.clone().requires_grad_()
    with torch.enable_grad():
        values = pair_loss(loss, *((x[:, 0], x[:, 1]) for x in (ours, theirs, counts)), beta=beta)
        (slopes,) = torch.autograd.grad(values.sum(), ours)
    return values.detach().numpy(), slopes.numpy()
