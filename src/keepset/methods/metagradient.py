"""Metagradient: the exact derivative of the target's loss after the real training, by each row's weight in it.

    S(z) = −∂J(θ_T(w)) / ∂w_z  at w = 1

θ_T(w): what `train` makes of the base on the whole pool, AdamW with its schedule, clipping, decay and batches, row z
counting w_z times in its batches' sums. J: the target's loss there. Large: more of z lowers the target's loss; to
first order J rises by S(z) where z is left out. The derivation is in `features/metagradient.py`.

After REPLAY / MAGIC (arXiv 2503.13751, 2504.16430), which do this for a plain loss; here J may be a preference loss.
The weights are the trainer's (`Training.weights`): w_z = 0 is the run with z masked, its batches' denominators kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, task_parts
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.metagradient import Metagradient as Stored
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def metagradient(derivatives: np.ndarray, *, reduce: Reduce = "mean") -> tuple[np.ndarray, np.ndarray]:
    """From ∂J/∂w (n, j) of each task's loss to scores (n,) and each task's (n, j)."""
    per_task = -np.asarray(derivatives, dtype=np.float64)
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class Metagradient(Method):
    """How much the target's loss after training on the whole pool falls with a row's weight."""

    name = "metagradient"
    when = (
        "if four trainings are affordable: the exact derivative; best on the target's mean preference in our "
        "bank, not told from `rose`"
    )
    paper = "MAGIC, arXiv 2504.16430"
    formula = "S = −∂J(θ_T(w))/∂w_z"
    needs = ("replay", "target")
    cost = "retraining"
    loss: Literal["dpo", "margin", "mean_margin", "sft"] = "dpo"
    beta: float = 0.1
    reduce: Literal["mean", "max"] = "mean"
    seed: int = 0

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        """The replayed training."""
        beta = float(self.beta) if self.loss == "dpo" else 0.0
        return {"replay": Stored(self.loss, beta, self.reduce == "max", int(self.seed), shots)}

    def score(self, features: Features) -> Scores:
        """Minus the derivatives; a column a task where each has its own."""
        score, per_task = metagradient(features["replay"], reduce=self.reduce)
        names = features.tasks[0]
        return Scores(score, task_parts(names, per_task) if per_task.shape[1] == len(names) else {})

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: each step of a training passes its noise on."""

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """`beta` of a loss without one."""
        if self.loss != "dpo":
            yield ("beta",), "only `loss: dpo` has one"
