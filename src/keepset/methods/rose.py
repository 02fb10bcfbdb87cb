"""ROSE: reward-oriented selection (arXiv 2412.00631): influence of a row on the DPO loss of a few preference pairs.

    S(z) = max_j Σ_c w_c · <Γ_c(z), v_cj> / ‖Γ_c(z)‖,     w_c = η_c / Σ_k η_k
    v_cj = mean over the pairs p of task j of  u(∇ℓ_DPO(p; θ_c)),   u(x) = x / ‖x‖

Γ_c(z): row z's LoRA gradient at warm-up checkpoint c after the Adam map. η_c: mean learning rate of checkpoint c. Sign:
ℓ_DPO's gradient and Γ are both of losses, so a large S means that a step on z lowers the preference loss.

The mean over pairs of cosines is the dot product with the mean unit vector, so `dots` against one v_cj a task is exact.
Followed: the official code (sum over checkpoints, then mean over shots, then max over tasks), without its projection to
8192 dimensions. Whether v_cj is made of unit vectors or of raw gradients is the caller's choice of targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from keepset.errors import RecipeError
from keepset.methods.gradient import AdamMap, GradientMethod, Per, cosines_noise
from keepset.methods.method import Columns, Features
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.influence import InfluenceRequest
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def rose(
    dots: np.ndarray,
    norms: np.ndarray,
    lr: np.ndarray | None = None,
    *,
    cosine: bool = True,
    reduce: Reduce = "max",
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce inner products to one score a row.

    `dots` (c, n, j) are <Γ_c(z_i), v_cj>, `norms` (c, n) ‖Γ_c(z_i)‖, `lr` (c,) each checkpoint's mean learning rate,
    None: equal weights. `cosine` divides by the row's norm, as the official code does; a zero norm gives NaN: the
    caller quarantines it. Returns scores (n,) and per_task (n, j).

    Raises:
        ValueError: shapes that don't fit, or weights that are negative or sum to 0.
    """
    weights = checkpoint_weights(lr, len(np.asarray(dots)))
    per_task = np.einsum("c,cnj->nj", weights, checkpoint_parts(dots, norms, cosine=cosine))
    return reduce_tasks(per_task, reduce), per_task


def checkpoint_weights(lr: np.ndarray | None, c: int) -> np.ndarray:
    """Return w (c,), the learning rates scaled to sum 1; equal weights for None."""
    weights = np.ones(c) if lr is None else np.asarray(lr, dtype=np.float64)
    if weights.shape != (c,) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"lr must be {c} non-negative numbers with a positive sum, got {weights}")
    return weights / weights.sum()


def checkpoint_parts(dots: np.ndarray, norms: np.ndarray, *, cosine: bool = True) -> np.ndarray:
    """Return (c, n, j): each checkpoint's unweighted share, cosine or plain dot product, for the scores table."""
    dots, norms = np.asarray(dots, dtype=np.float64), np.asarray(norms, dtype=np.float64)
    if dots.ndim != 3 or norms.shape != dots.shape[:2]:
        raise ValueError(f"dots (c, n, j) and norms (c, n) don't fit: {dots.shape} and {norms.shape}")
    if not cosine:
        return dots
    with np.errstate(divide="ignore", invalid="ignore"):
        return dots / norms[:, :, None]


@dataclass(frozen=True)
class CosineMethod(GradientMethod):
    """A weighted sum over checkpoints of cosines (or dots) of mapped gradients; of the last `last` ones, 0: of all."""

    map: AdamMap = "adam"
    normalise: Literal["pair", "task"] = "pair"
    cosine: bool = True
    reduce: Literal["max", "mean"] = "max"
    per: Per = "task"
    last: int = 0

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        stages = super().stages(job, shots)
        return dict(list(stages.items())[-self.last :])

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return rose(dots, norms, lr, cosine=self.cosine, reduce=self.reduce)

    def noise(self, columns: Columns, relative: float) -> np.ndarray | None:
        return cosines_noise(columns, relative, cosine=self.cosine, map=self.map)


@dataclass(frozen=True)
class Rose(CosineMethod):
    """Influence on the DPO loss of the target's pairs; `last`: only the last so many checkpoints (0: all)."""

    name = "rose"
    when = (
        "if you have pairs and the pool's mistakes look like its good answers: best on the target's "
        "preference, where `less` and `bm25` take both"
    )
    paper = "ROSE, arXiv 2412.00631"
    formula = "S = max_j Σ_c w_c cos(Γ_c(z), ∇ℓ_DPO,j)"
    needs: ClassVar[tuple[str, ...]] = ("warmup", "gradients", "target", "pairs")
    loss: Literal["dpo", "margin", "mean_margin"] = "dpo"
    reference: Literal["base", "checkpoint", "none"] = "base"
    beta: float = 0.1

    @property
    def request(self) -> InfluenceRequest:
        return InfluenceRequest(self.loss, self.map, self.reference, float(self.beta), self.normalise, per=self.per)

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        """The dots at the checkpoints that count, in order of time.

        Raises:
            RecipeError: the target is not of pairs.
        """
        if not job.target.has_pairs:
            raise RecipeError("rose needs pairs: the target has no `rejected`; use less, or give chosen and rejected")
        return super().stages(job, shots)

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if (self.loss, self.normalise) != ("dpo", "task"):
            yield ("beta", "reference"), "it cancels unless `loss: dpo` and `normalise: task`"
