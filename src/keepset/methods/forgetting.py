"""Forgetting events (arXiv 1812.05159): how often a row that was learnt is lost again during training.

    S(z) = number of c with  L_c(z) ≤ τ(z)  and  L_{c+1}(z) > τ(z);      never learnt: S(z) = C

L_c: mean loss at checkpoint c = 0 ... C − 1. The paper counts flips of a classifier from right to wrong, and takes
examples never learnt as forgotten infinitely often. A language model has no "right": here a row is learnt while its
loss is at or below τ = half-way between its first and its lowest loss. With few checkpoints many rows tie: the row's
total rise of loss x = Σ max(0, L_{c+1} − L_c) is added as x / (1 + x), below 1, so that the count decides first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores
from keepset.stages.losses import Losses
from keepset.stages.stage import Stage
from keepset.stages.trained import checkpoints

if TYPE_CHECKING:
    from keepset.stages.job import Job


def forgetting(losses: np.ndarray) -> np.ndarray:
    """Score rows by their forgetting events; larger = forgotten more often = first.

    `losses` (c, n) are mean nats a token at each checkpoint, in order of time, at least two. Returns (n,) float64; NaN
    for a row with a NaN loss.

    Raises:
        ValueError: fewer than two checkpoints.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or len(losses) < 2:
        raise ValueError(f"forgetting needs losses (c, n) of at least two checkpoints, got {losses.shape}")
    lowest = losses.min(axis=0)
    learnt = (losses <= (losses[0] + lowest) / 2) & (lowest < losses[0])  # a loss that never fell: never
    events = (learnt[:-1] & ~learnt[1:]).sum(axis=0).astype(np.float64)
    score = np.where(learnt.any(axis=0), events, len(losses))
    rises = np.maximum(np.diff(losses, axis=0), 0).sum(axis=0)
    return np.where(np.isnan(lowest), np.nan, score + rises / (1 + rises))


@dataclass(frozen=True)
class Forgetting(Method):
    """Forgetting events over the base and the warm-up's checkpoints."""

    name = "forgetting"
    when = "as a baseline; it told nothing of the trained models in our bank"
    paper = "arXiv 1812.05159"
    formula = "S = times learnt and lost again"
    needs = ("losses", "warmup", "checkpoint-losses")
    cost = "gradients"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        after = {f"checkpoint {c.at}": Losses("checkpoint", at=c.at) for c in checkpoints(job)}
        return {"base": Losses(), **after}

    def score(self, features: Features) -> Scores:
        losses = [features[name] for name in features.stages]
        return Scores(forgetting(np.stack([one["nll"] / one["n_tokens"] for one in losses])))

    def noise(self, columns: Columns, relative: float) -> None:
        """None: it counts events, so noise changes nothing or a whole one."""
