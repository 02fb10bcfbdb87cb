"""What the methods on gradients share: dots and norms at the warm-up's checkpoints, and columns beside the score."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from keepset.methods.method import Columns, Cost, Features, Method, Scores, task_parts
from keepset.stages.influence import Dots, InfluenceRequest
from keepset.stages.stage import Stage
from keepset.stages.trained import checkpoints

if TYPE_CHECKING:
    from keepset.stages.job import Job

AdamMap = Literal["adam", "adam-less", "precondition", "sgd", "sign"]
Labels = Literal["sampled", "data"]
Per = Literal["task", "query"]


@dataclass(frozen=True)
class GradientMethod(Method):
    """A method on the dots of the rows' gradients with the target's."""

    needs: ClassVar[tuple[str, ...]] = ("warmup", "gradients", "target")
    cost: ClassVar[Cost] = "gradients"

    @property
    def request(self) -> InfluenceRequest:
        """Which gradients of the target, and which map of the rows'; plain ones unless a method says otherwise."""
        return InfluenceRequest()

    @property
    def columns_per(self) -> str:
        """What the columns beside the score stand for: tasks, or rows of the target (see `Features.column_names`)."""
        return self.request.per

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {f"checkpoint {c.at}": Dots(self.request, c.at, shots) for c in checkpoints(job)}

    @abstractmethod
    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n,), and per task (n, j), of dots (c, n, j), norms (c, n) and mean learning rates (c,)."""

    def score(self, features: Features) -> Scores:
        """The reduced dots; beside them each checkpoint's norm, momentum share, best cosine and learning rate."""
        names = [name for name, stage in features.stages.items() if isinstance(stage, Dots)]
        columns = [features[name] for name in names]
        lr = np.array([features.learning_rate(name) for name in names])
        if not lr.any():  # a decay to 0 in a single step: LESS's rate, logged after the step, is 0
            features.say("the warm-up took too few steps for a mean learning rate: its checkpoints count alike")
            lr = np.ones(len(lr))
        dots, norms = np.stack([one["dots"] for one in columns]), np.stack([one["norms"] for one in columns])
        score, per_task = self.reduce_dots(features, dots, norms, lr)
        parts = task_parts(features.column_names(self.columns_per), per_task)
        for c, one in enumerate(columns):
            parts[f"ckpt{c}.norm"] = norms[c]
            parts[f"ckpt{c}.momentum"] = one["momentum"]
            parts[f"ckpt{c}.cosine"] = (dots[c] / norms[c][:, None]).max(axis=1)
            parts[f"ckpt{c}.lr"] = np.full(len(score), lr[c])
            for name in ("store_rms", "store_spearman"):
                if name in one:
                    parts[f"ckpt{c}.{name}"] = np.full(len(score), one[name])
        return Scores(score, parts)


def of_store(columns: Columns) -> bool:
    """Whether the dots are estimates of a gradient store, whose own error is larger than numerical noise."""
    return "ckpt0.store_rms" in columns


def cosines_noise(columns: Columns, relative: float, *, cosine: bool, map: str) -> np.ndarray | None:
    """Noise (n,) of cosines of gradients, or of dot products with targets no longer than 1.

    None from a store, and where gradients are mapped to signs: an entry near 0 may turn.
    """
    if of_store(columns) or map == "sign":
        return None
    if cosine:
        return np.full(len(columns["score"]), relative)
    norms, lr = checkpoint_columns(columns)
    return relative * (lr / lr.sum(axis=0) * norms).sum(axis=0)


def checkpoint_columns(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Norms and learning rates of every checkpoint, (c, n) each."""
    count = sum(name.startswith("ckpt") and name.endswith(".norm") for name in columns)
    norms, lr = (np.stack([columns[f"ckpt{c}.{part}"] for c in range(count)]) for part in ("norm", "lr"))
    return norms, lr
