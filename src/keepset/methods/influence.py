"""Influence functions (arXiv 1703.04730): the effect on the target's loss of training a little more on a row.

    S_j(z) = v_jᵀ (H + λ I)⁻¹ ∇ℓ(z),     v_j = gradient of target j's loss

H: Hessian (or Gauss-Newton) of the training loss at θ, the mean over rows. The paper's influence of up-weighting z on
the target loss is −S: a large S means that z lowers it. λ (damping) keeps the solve sane where H is singular or
indefinite.

H is symmetric, so the solve is done once per target, never per row: r_j = (H + λ I)⁻¹ v_j goes where v_j went, and
the scores are the dot products <∇ℓ(z), r_j>. `keepset.features.solvers` turns targets (j, p) into such r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keepset.methods.gradient import InfluenceFunction, Labels
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.influence import Curvature


def influence(dots: np.ndarray, *, reduce: Reduce = "mean") -> tuple[np.ndarray, np.ndarray]:
    """Reduce dots (n, j) = <∇ℓ(z_i), r_j> to scores (n,); per task (n, j) beside them.

    Args:
        dots: inner products with the solved targets.
        reduce: over targets; "mean" = the influence on the mean target loss.
    """
    per_task = np.asarray(dots, dtype=np.float64)
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class Influence(InfluenceFunction):
    """Influence function: some rows' damped Fisher matrix inverted exactly, or Gauss-Newton by conjugate gradients."""

    name = "influence"
    paper = "arXiv 1703.04730"
    formula = "S = mean_j v_jᵀ (F + λI)⁻¹ ∇ℓ(z)"
    curvature: Literal["fisher", "gauss-newton"] = "fisher"
    curvature_rows: int = 100
    labels: Labels = "sampled"
    damping: float = 0.1
    reduce: Literal["max", "mean"] = "mean"
    seed: int = 0

    @property
    def solver(self) -> Curvature:
        solver = "cg" if self.curvature == "gauss-newton" else "fisher"
        return Curvature(solver, self.labels, float(self.damping), int(self.curvature_rows), int(self.seed))

    def reduce_dots(self, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return influence(dots[0], reduce=self.reduce)

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.curvature == "gauss-newton":
            yield ("labels",), "`gauss-newton` takes no labels"
