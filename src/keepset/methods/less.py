"""LESS: influential data for targeted instruction tuning (arXiv 2402.04333), and TracIn (arXiv 2002.08484) beside it.

    S_LESS(z)   = max_j Σ_c w_c · <Γ_c(z), v_cj> / ‖Γ_c(z)‖,   w_c = η_c / Σ_k η_k
    S_TracIn(z) = mean_j Σ_c η_c · <∇ℓ(z; θ_c), ∇ℓ_val,j(θ_c)>

Γ_c(z): row z's LoRA gradient at checkpoint c after the Adam map. v_cj: mean over task j's validation rows of the unit
gradient of their SFT loss. η_c: mean learning rate of checkpoint c. TracIn takes plain gradients on both sides and no
norms. LESS's text defines the cosine against the task's mean gradient, its code the mean of cosines: both are a choice
of v_cj. ROSE is the same reduction with v_cj from preference pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from keepset.methods.gradient import GradientMethod, Per, checkpoint_columns, cosines_noise, of_store
from keepset.methods.method import Columns, Features
from keepset.methods.rose import CosineMethod, rose
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.influence import InfluenceRequest


def tracin(dots: np.ndarray, lr: np.ndarray | None = None, *, reduce: Reduce = "mean") -> tuple[np.ndarray, np.ndarray]:
    """Sum learning rate times plain inner product over the checkpoints (TracInCP, its equation 1).

    `dots` (c, n, j) are inner products of plain gradients, `lr` (c,) learning rates, not normalised, None: 1 each. The
    mean over tasks is the influence on the mean validation loss. Returns scores (n,) and per_task (n, j).
    """
    dots = np.asarray(dots, dtype=np.float64)
    weights = np.ones(len(dots)) if lr is None else np.asarray(lr, dtype=np.float64)
    if dots.ndim != 3 or weights.shape != dots.shape[:1]:
        raise ValueError(f"dots (c, n, j) and lr (c,) don't fit: {dots.shape} and {weights.shape}")
    per_task = np.einsum("c,cnj->nj", weights, dots)
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class Less(CosineMethod):
    """Influence on the SFT loss of the target's (chosen) rows; `last`: only the last so many checkpoints (0: all)."""

    name = "less"
    when = (
        "if the target is a kind of text: best on the loss of its answers, of unseen ones too; wrong answers "
        "of that kind count as well"
    )
    paper = "LESS, arXiv 2402.04333"
    formula = "S = max_j Σ_c w_c cos(Γ_c(z), ∇ℓ_SFT,j)"

    @property
    def request(self) -> InfluenceRequest:
        return InfluenceRequest(map=self.map, normalise=self.normalise, per=self.per)


@dataclass(frozen=True)
class TracIn(GradientMethod):
    """Plain inner products, learning-rate-weighted over checkpoints."""

    name = "tracin"
    when = "as a baseline: raw dots lean to rows with large gradients, short answers first"
    paper = "TracIn, arXiv 2002.08484"
    formula = "S = mean_j Σ_c η_c <∇ℓ(z), ∇ℓ_j>"
    reduce: Literal["max", "mean"] = "mean"
    per: Per = "task"

    @property
    def request(self) -> InfluenceRequest:
        return InfluenceRequest(per=self.per)

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return tracin(dots, lr, reduce=self.reduce)

    def noise(self, columns: Columns, relative: float) -> np.ndarray | None:
        """That of dot products with unit targets, weighted by the learning rates; None from a store."""
        norms, lr = checkpoint_columns(columns)
        return None if of_store(columns) else relative * (lr * norms).sum(axis=0)


@dataclass(frozen=True)
class GradCosine(GradientMethod):
    """Cosine of plain gradients."""

    name = "grad-cosine"
    when = "as `less` without the Adam map, and no worse in our bank"
    paper = "–"
    formula = "S = max_j Σ_c w_c cos(∇ℓ(z), ∇ℓ_j)"
    reduce: Literal["max", "mean"] = "max"
    per: Per = "task"

    @property
    def request(self) -> InfluenceRequest:
        return InfluenceRequest(per=self.per)

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return rose(dots, norms, lr, reduce=self.reduce)

    def noise(self, columns: Columns, relative: float) -> np.ndarray | None:
        return cosines_noise(columns, relative, cosine=True, map="sgd")
