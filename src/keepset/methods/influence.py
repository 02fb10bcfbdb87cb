"""Influence functions (arXiv 1703.04730): the effect on the target's loss of training a little more on a row.

    S_j(z) = v_jᵀ (H + λ I)⁻¹ ∇ℓ(z),     v_j = gradient of target j's loss

H: Hessian (or Gauss-Newton) of the training loss at θ, the mean over rows. The paper's influence of up-weighting z on
the target loss is −S: a large S means that z lowers it. λ (damping) keeps the solve sane where H is singular or
indefinite.

H is symmetric, so the solve is done once per target, never per row: r_j = (H + λ I)⁻¹ v_j goes where v_j went, and
the scores are the dot products <∇ℓ(z), r_j>. `keepset.features.solvers` turns targets (j, p) into such r.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from keepset.methods.gradient import GradientMethod, Labels, Per
from keepset.methods.method import Columns, Features
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.influence import Curvature, Dots, InfluenceRequest
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def influence(
    dots: np.ndarray, norms: np.ndarray | None = None, *, reduce: Reduce = "mean"
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce dots (n, j) = <∇ℓ(z_i), r_j> to scores (n,); per task (n, j) beside them.

    Args:
        dots: inner products with the solved targets.
        norms: (n,) ‖∇ℓ(z_i)‖, to divide by (a zero norm gives NaN); None: the inner products themselves.
        reduce: over targets; "mean" = the influence on the mean target loss.
    """
    per_task = np.asarray(dots, dtype=np.float64)
    if norms is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            per_task = per_task / np.asarray(norms, dtype=np.float64)[:, None]
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class InfluenceFunction(GradientMethod):
    """TracIn's pass at the last checkpoint, with the target multiplied by an inverse curvature.

    With `cosine` the dots are divided by the row's norm, as LESS and ROSE do: raw dots are drawn to rows with large
    gradients, which short answers have (experiments/methods-table).
    """

    reduce: Literal["max", "mean"] = "mean"
    per: Per = "task"
    cosine: bool = False
    needs: ClassVar[tuple[str, ...]] = ("warmup", "gradients", "curvature", "target")

    @property
    def request(self) -> InfluenceRequest:
        """Plain gradients, the target's after the inverse."""
        return InfluenceRequest(curvature=self.solver, per=self.per)

    @property
    @abstractmethod
    def solver(self) -> Curvature:
        """The inverse that the target is multiplied by."""

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"last": Dots(self.request, -1, shots)}

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return influence(dots[0], norms[0] if self.cosine else None, reduce=self.reduce)

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: the solve multiplies noise by the curvature's condition, and a label that is drawn may turn."""


@dataclass(frozen=True)
class Influence(InfluenceFunction):
    """Influence function: some rows' damped Fisher matrix inverted exactly, or Gauss-Newton by conjugate gradients."""

    name = "influence"
    when = "if one checkpoint has to do; with `cosine: true`, which was better on the target's loss in our bank"
    paper = "arXiv 1703.04730"
    formula = "S = mean_j v_jᵀ (F + λI)⁻¹ ∇ℓ(z)"
    curvature: Literal["fisher", "gauss-newton"] = "fisher"
    curvature_rows: int = 100
    labels: Labels = "sampled"
    damping: float = 0.1
    seed: int = 0

    @property
    def solver(self) -> Curvature:
        solver = "cg" if self.curvature == "gauss-newton" else "fisher"
        return Curvature(solver, self.labels, float(self.damping), int(self.curvature_rows), int(self.seed))

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.curvature == "gauss-newton":
            yield ("labels",), "`gauss-newton` takes no labels"
