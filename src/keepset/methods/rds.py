"""RDS and RDS+: representation-based selection (RDS: baseline of arXiv 2402.04333; RDS+: arXiv 2503.01807).

    S(z) = max_j mean_{q in task j} cos(h(z), h(q))

h: a pooled last-layer hidden state. RDS pools the last token, RDS+ the position-weighted mean; both are a choice of the
caller's `representations`, and so is an embedding model. RDS+ chooses by round-robin over the queries: take
`per="query"` columns and the selection policy `round_robin`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, cosine_noise, task_parts
from keepset.methods.tasks import Reduce, reduce_queries, reduce_tasks
from keepset.stages.representations import Embeddings, Representations, TargetEmbeddings, TargetRepresentations
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job

Pooling = Literal["last", "weighted_mean"]


def rds(
    pool: np.ndarray,
    queries: np.ndarray,
    tasks: Sequence[str] | np.ndarray,
    *,
    reduce: Reduce = "max",
    per: Literal["task", "query"] = "task",
    block: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by their cosine similarity to the target.

    `pool` (n, d) and `queries` (m, d) are representations of the rows and of the target's rows with their tasks (m,).
    `per` says whether the second result has a column a task, or a query in the order given; `block` rows are compared
    at a time. Returns scores (n,) and per_task (n, j), or (n, m) with per="query". A zero or NaN representation gives
    NaN.

    Raises:
        ValueError: shapes that don't fit.
    """
    pool, queries = np.asarray(pool), np.asarray(queries)
    if pool.ndim != 2 or queries.ndim != 2 or pool.shape[1] != queries.shape[1] or len(queries) != len(tasks):
        raise ValueError(f"pool {pool.shape}, queries {queries.shape} and {len(tasks)} tasks don't fit")
    unit_queries = unit_rows(queries)
    parts = []
    for start in range(0, len(pool), block):
        cosines = unit_rows(pool[start : start + block]) @ unit_queries.T
        parts.append(cosines if per == "query" else reduce_queries(cosines, tasks))
    per_column = np.concatenate(parts) if parts else np.empty((0, len(queries)))
    return reduce_tasks(per_column, reduce), per_column


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Return x (n, d) as float64 with rows of length 1; a zero row becomes NaN, it has no direction."""
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@dataclass(frozen=True)
class Rds(Method):
    """Cosine of pooled hidden states, or of an embedding model's vectors, with the target's prompt + chosen rows."""

    name = "rds"
    when = "if one forward pass is all you can pay: above chance on the target's loss, below the gradient methods"
    paper = "arXiv 2402.04333"
    formula = "S = max_j mean_q cos(h(z), h(q))"
    needs = ("representations", "target")
    cost = "forward"
    pooling: Pooling = "last"
    reduce: Literal["max", "mean"] = "max"
    per: Literal["task", "query"] = "task"
    embedding_model: str = ""

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        if self.embedding_model:
            model = self.embedding_model
            return {"pool": Embeddings(model), "target": TargetEmbeddings(model, shots)}
        return {"pool": Representations(self.pooling), "target": TargetRepresentations(self.pooling, shots)}

    def score(self, features: Features) -> Scores:
        codes = features.tasks[1] if self.embedding_model else features.encoded_tasks
        return by_similarity(features, codes, self.reduce, self.per)

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        return cosine_noise(columns, relative)

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.embedding_model:
            yield ("pooling",), "an embedding model pools in its own way"


@dataclass(frozen=True)
class RdsPlus(Method):
    """RDS with the position-weighted mean of all tokens."""

    name = "rds+"
    when = "as `rds`, query by query; on our bank's short rows it told less than `rds`"
    paper = "arXiv 2503.01807"
    formula = "rds, position-weighted mean"
    needs = ("representations", "target")
    cost = "forward"
    reduce: Literal["max", "mean"] = "max"
    per: Literal["task", "query"] = "task"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"pool": Representations("weighted_mean"), "target": TargetRepresentations("weighted_mean", shots)}

    def score(self, features: Features) -> Scores:
        return by_similarity(features, features.encoded_tasks, self.reduce, self.per)

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        return cosine_noise(columns, relative)


def by_similarity(features: Features, codes: np.ndarray, reduce: Reduce, per: Literal["task", "query"]) -> Scores:
    """RDS on the features' states; `codes` (m,) are the tasks of the target's rows."""
    names = features.tasks[0]
    score, per_column = rds(features["pool"]["state"], features["target"], codes, reduce=reduce, per=per)
    if per == "query":
        names = [f"{names[code]}.{k}" for k, code in enumerate(codes)]
    return Scores(score, task_parts(names, per_column))
