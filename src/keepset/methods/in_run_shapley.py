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

from keepset.methods.method import Columns, Features, Method, Scores, task_parts
from keepset.methods.tasks import reduce_tasks
from keepset.stages.shapley import InRun
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


@dataclass(frozen=True)
class InRunShapley(Method):
    """Each row's share of the target's loss drop in one SGD run over the pool, from the warm-up's last checkpoint."""

    name = "in-run-shapley"
    when = "to share out what one run learnt among its rows; to choose by it, with `unit_norm: true`"
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
    unit_norm: bool = False

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        run = InRun(
            second_order=self.order == "second", learning_rate=float(self.learning_rate),
            batch_size=int(self.batch_size), epochs=int(self.epochs), seed=int(self.seed), shots=shots,
            unit_norm=self.unit_norm,
        )  # fmt: skip
        return {"run": run}

    def score(self, features: Features) -> Scores:
        per_task = features["run"]
        return Scores(reduce_tasks(per_task, self.reduce), task_parts(features.tasks[0], per_task))

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: each step of a training passes its noise on."""
