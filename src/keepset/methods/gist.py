"""GIST: gradients in the space that the target's own gradients span (arXiv 2602.18584).

    G = U S Vᵀ                          raw SFT gradients of the m target rows, (m, p); K = G Gᵀ = U S² Uᵀ
    c(z) = V_kᵀ ∇ℓ(z) = S_k⁻¹ U_kᵀ D(z),   D(z) = G ∇ℓ(z)          coordinates of a row, k numbers
    t_j  = mean_{q in j} (U_k S_k)_q                                coordinates of a task
    S(z) = max_j Σ_c w_c cos(c_c(z), t_cj),    w_c = η_c / Σ η

Everything follows from the rows' dots with each target row and from the m × m matrix K, so nothing is projected or
stored. Plain gradients: no Adam map, and with it no momentum that all rows share. k is the number of tasks unless
`rank` says otherwise, as in the authors' run with 9 subtasks; directions below 1e-6 of the largest are left out (the
authors add 1e-6 to S). `loss` takes gradients of a preference loss in the place of SFT's (ours). Followed: the
authors' `get_gist_gradients.py` and `matching_gist.py`, which use the last checkpoint (`last`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from keepset.errors import RecipeError
from keepset.methods.gradient import GradientMethod
from keepset.methods.method import Columns, Features
from keepset.methods.rose import checkpoint_weights
from keepset.methods.tasks import Reduce, reduce_tasks
from keepset.stages.influence import Dots, InfluenceRequest, TargetGradients
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job

SMALLEST = 1e-6


def gist(
    dots: np.ndarray,
    gram: np.ndarray,
    tasks: np.ndarray,
    lr: np.ndarray | None = None,
    *,
    rank: int = 0,
    reduce: Reduce = "max",
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by the cosine of their coordinates with each task's.

    Args:
        dots: (c, n, m) inner products of the rows' gradients with the target rows'.
        gram: (c, m, m) inner products of the target rows' gradients with each other.
        tasks: (m,) task number of each target row, 0 ... j − 1.
        lr: (c,) mean learning rate of each checkpoint; None = equal weights.
        rank: directions k that are kept; 0: as many as tasks.
        reduce: "max" or "mean" over tasks.

    Returns:
        scores (n,) and per_task (n, j); NaN for a row without a component in the space.

    Raises:
        ValueError: shapes that don't fit, or a target without any gradient.
    """
    dots, gram = np.asarray(dots, dtype=np.float64), np.asarray(gram, dtype=np.float64)
    m = len(tasks)
    if dots.ndim != 3 or dots.shape[2] != m or gram.shape != (len(dots), m, m):
        raise ValueError(f"dots {dots.shape} (c, n, m) and gram {gram.shape} (c, m, m) don't fit {m} target rows")
    count = int(np.max(tasks)) + 1
    per_task = np.zeros((dots.shape[1], count))
    for weight, d, k in zip(checkpoint_weights(lr, len(dots)), dots, gram, strict=True):
        values, vectors = np.linalg.eigh(k)
        s = np.sqrt(np.maximum(values[::-1], 0.0))[: rank or count]
        s = s[s > SMALLEST * s[0]] if s[0] > 0 else s[:0]
        if not len(s):
            raise ValueError("gist: no row of the target has a gradient")
        u = vectors[:, ::-1][:, : len(s)]
        rows = d @ u / s
        goals = np.stack([(u * s)[tasks == j].mean(axis=0) for j in range(count)])
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            goals = goals / np.linalg.norm(goals, axis=1, keepdims=True)
        per_task += weight * rows @ goals.T
    return reduce_tasks(per_task, reduce), per_task


@dataclass(frozen=True)
class Gist(GradientMethod):
    """Cosine in the space of the target's gradients; `last`: only the last so many checkpoints (0: all)."""

    name = "gist"
    when = "as `less` from the target's own directions, no Adam map; below it in our bank"
    paper = "GIST, arXiv 2602.18584"
    formula = "S = max_j Σ_c w_c cos(V_kᵀ∇ℓ(z), V_kᵀ∇ℓ_j)"
    needs: ClassVar[tuple[str, ...]] = ("warmup", "gradients", "target")
    loss: Literal["sft", "dpo"] = "sft"
    rank: int = 0
    reduce: Literal["max", "mean"] = "max"
    last: int = 1

    @property
    def request(self) -> InfluenceRequest:
        return InfluenceRequest(self.loss, normalise="pair", per="query")

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        """The dots at the checkpoints that count, and the gradients of the target's rows there.

        Raises:
            RecipeError: a preference loss, and the target is not of pairs.
        """
        if self.loss != "sft" and not job.target.has_pairs:
            raise RecipeError("gist: `loss: dpo` needs pairs: the target has no `rejected`")
        dots = dict(list(super().stages(job, shots).items())[-self.last :])
        goals = {f"target {s.at}": s.target for s in dots.values() if isinstance(s, Dots)}
        return {**dots, **goals}

    @property
    def columns_per(self) -> str:
        return "task"

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates from the dots with unit gradients, and from those gradients' lengths and inner products."""
        goals = [features[name] for name, stage in features.stages.items() if isinstance(stage, TargetGradients)]
        lengths = np.stack([goal["norms"] for goal in goals])
        blocks = [[b.reshape(len(b), -1) for n, b in goal.items() if n.startswith("block.")] for goal in goals]
        units = np.stack([sum(b.astype(np.float64) @ b.T.astype(np.float64) for b in parts) for parts in blocks])
        return gist(
            dots * lengths[:, None, :], units * lengths[:, :, None] * lengths[:, None, :], features.encoded_tasks, lr,
            rank=self.rank, reduce=self.reduce,
        )  # fmt: skip

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: small directions of the target multiply noise."""
