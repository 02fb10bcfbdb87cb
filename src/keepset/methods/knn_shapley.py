"""KNN-Shapley (arXiv 1908.08619), exact, with a similarity as the utility.

    U_q(A) = (1/K) Σ_{k ≤ min(K, |A|)} s(q, α_k(A)),     S(z) = reduce_j mean_{q in j} φ_z(U_q)
    φ(α_N) = s_N / K · min(K, N) / N,     φ(α_i) = φ(α_{i+1}) + (s_i − s_{i+1}) / K · min(K, i) / i

α_i: the row with the i-th largest similarity to query q, s_i that similarity, N rows in all. U_q(A): how well the K
rows of A nearest to q match it, an empty place counting 0. The paper's utility puts 1[label of α_k = label of q]
where s stands; the recursion (its Theorem 1) only needs a value per row, and text has no labels. Shapley's axioms
hold: the values sum to U_q of the whole pool, equal rows get equal values, a row whose similarity is 0 among
non-negative ones gets 0.

"Shapley values" as ROSE's baseline is not defined in any source seen; this is our reading of a Shapley value for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, cosine_noise, task_parts
from keepset.methods.rds import Pooling, unit_rows
from keepset.methods.tasks import Reduce, reduce_tasks, task_columns
from keepset.stages.representations import Representations, TargetRepresentations
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def knn_shapley(
    pool: np.ndarray,
    queries: np.ndarray,
    tasks: Sequence[str] | np.ndarray,
    *,
    k: int = 5,
    reduce: Reduce = "mean",
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by their exact Shapley value in the K-nearest-neighbour game on cosine similarity.

    `pool` (n, d) and `queries` (m, d) are representations of the rows and of the target's rows with their tasks (m,);
    `k` neighbours count. With the mean over tasks the values sum to the tasks' mean utility. Returns scores (n,) and
    per_task (n, j). A row without a direction (zero or NaN) is no player and gets NaN.
    """
    names, column = task_columns(tasks)
    unit_pool, unit_queries = unit_rows(pool), unit_rows(queries)
    per_task = np.zeros((len(unit_pool), len(names)))
    for query, j in zip(unit_queries, column, strict=True):
        per_task[:, j] += shapley_of_similarities(unit_pool @ query, k)
    per_task /= np.bincount(column)
    return reduce_tasks(per_task, reduce), per_task


def shapley_of_similarities(similarities: np.ndarray, k: int) -> np.ndarray:
    """Return the Shapley values (n,) of U(A) = (1/K) · sum of A's K largest similarities (n,).

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    s = np.asarray(similarities, dtype=np.float64)
    values = np.full(len(s), np.nan)
    order = np.argsort(-s, kind="stable")[: np.count_nonzero(~np.isnan(s))]  # NaN sorts last
    n = len(order)
    if n == 0:
        return values
    ranked = s[order]
    places = np.arange(1, n + 1)
    steps = -np.diff(ranked) / k * np.minimum(k, places[:-1]) / places[:-1]
    last = ranked[-1] / k * min(k, n) / n
    values[order] = last + np.concatenate([np.cumsum(steps[::-1])[::-1], np.zeros(1)])
    return values


@dataclass(frozen=True)
class KnnShapley(Method):
    """Exact Shapley value in the nearest-neighbour game on cosine similarity."""

    name = "knn-shapley"
    when = "as `rds`, if values have to add up; not told from chance in our bank"
    paper = "KNN-Shapley, arXiv 1908.08619"
    formula = "S = mean_q φ_z(U_q), U_q = mean similarity of the K nearest"
    needs = ("representations", "target")
    cost = "forward"
    k: int = 5
    pooling: Pooling = "weighted_mean"
    reduce: Literal["max", "mean"] = "mean"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"pool": Representations(self.pooling), "target": TargetRepresentations(self.pooling, shots)}

    def score(self, features: Features) -> Scores:
        score, per_task = knn_shapley(
            features["pool"]["state"], features["target"], features.encoded_tasks, k=self.k, reduce=self.reduce
        )
        return Scores(score, task_parts(features.tasks[0], per_task))

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """Its slopes in the similarities sum to 2 / K at most (the recursion above)."""
        return 2 / self.k * cosine_noise(columns, relative)
