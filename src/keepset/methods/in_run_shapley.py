"""In-run data Shapley (arXiv 2406.11011): the value of each row in one training run, from its own gradients.

    U_t(A) = ℓ_val(θ_t) − ℓ_val(θ_t − η_t Σ_{i in A} g_i),    A a part of step t's batch,    φ = Σ_t φ_t
    first order:   φ_t(z) = η_t <v_t, g_z>
    second order:  φ_t(z) = η_t <v_t, g_z> − (η_t² / 2) g_zᵀ H_t Σ_{i in batch} g_i

g_i: gradient of row i as it enters the step (divided by the batch size where the loss is a mean), v_t and H_t:
gradient and Hessian of the target's loss. φ_t is the exact Shapley value of U_t's Taylor expansion. The paper takes U
as the change of the loss (negative = good); here the sign is turned. Its runs take SGD steps; with Adam the dot
products are those of the mapped gradients and the values are an approximation. Rows are valued in the run's batches
only: others get 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, task_parts
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.shapley import InRun, step_values
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def in_run_shapley(
    dots: np.ndarray,
    lr: np.ndarray,
    in_batch: np.ndarray,
    curvature: np.ndarray | None = None,
    *,
    reduce: Reduce = "mean",
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the steps' Shapley values.

    Args:
        dots: (t, n, j) <v_tj, g_i>; what stands for rows outside a step's batch is ignored.
        lr: (t,) learning rates.
        in_batch: (t, n) bool.
        curvature: (t, n, j) g_iᵀ H_tj Σ_{batch} g; None: first order.
        reduce: over target tasks.

    Returns:
        scores (n,) and per_task (n, j).

    Raises:
        ValueError: shapes that don't fit.
    """
    dots, lr, in_batch = np.asarray(dots, np.float64), np.asarray(lr, np.float64), np.asarray(in_batch, bool)
    if dots.ndim != 3 or lr.shape != dots.shape[:1] or in_batch.shape != dots.shape[:2]:
        raise ValueError(
            f"dots (t, n, j), lr (t,), in_batch (t, n) don't fit: {dots.shape}, {lr.shape}, {in_batch.shape}"
        )
    if curvature is not None and np.shape(curvature) != dots.shape:
        raise ValueError(f"curvature {np.shape(curvature)} and dots {dots.shape} must have one shape")
    values = step_values(dots, lr[:, None, None], curvature)
    per_task = np.where(in_batch[:, :, None], values, 0.0).sum(axis=0)
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class InRunShapley(Method):
    """Each row's share of the target's loss drop in one SGD run over the pool, from the warm-up's last checkpoint."""

    name = "in-run-shapley"
    paper = "In-Run Data Shapley, arXiv 2406.11011"
    formula = "S = Σ_t η_t <v_t, g> [− η_t²/2 · gᵀ H_t Σ g]"
    needs = ("in-run", "warmup", "target")
    cost = "gradients"
    order: Literal["first", "second"] = "first"
    learning_rate: float = 0.05
    batch_size: int = 32
    epochs: int = 1
    reduce: Literal["max", "mean"] = "mean"
    seed: int = 0

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        run = InRun(
            second_order=self.order == "second", learning_rate=float(self.learning_rate),
            batch_size=int(self.batch_size), epochs=int(self.epochs), seed=int(self.seed), shots=shots,
        )  # fmt: skip
        return {"run": run}

    def score(self, features: Features) -> Scores:
        per_task = features["run"]
        return Scores(reduce_tasks(per_task, self.reduce), task_parts(features.tasks[0], per_task))

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: each step of a training passes its noise on."""
