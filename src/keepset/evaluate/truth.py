"""Does a score say what training does? Rank correlations of predicted and measured outcomes; NumPy and SciPy only.

The linear datamodeling score (LDS; Park et al., arXiv 2303.14186): M models are trained on subsets S_m of the rows, and
for a query q

    ρ_q = Spearman over m of  Σ_{i in S_m} score_i  and  outcome of model m on q

is averaged over queries. Intervals are over both: subsets and queries are drawn anew, with replacement, and all is
computed again. Where an outcome doesn't vary over the drawn models there is nothing to order, and ρ_q counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from keepset.evaluate.statistics import Interval

PERMUTATIONS = 20_000
ENDS = [2.5, 97.5]


@dataclass(frozen=True)
class Measured:
    """What M models gave on k items, larger is better.

    Attributes:
        items: (M, k).
        groups: (k,) the query that each item is of, 0 ... Q-1; a query's outcome is the mean over its items.
    """

    items: np.ndarray
    groups: np.ndarray

    @property
    def queries(self) -> int:
        """How many there are."""
        return int(self.groups.max()) + 1

    def by_query(self, models: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes of drawn models by query, and how often each query counts.

        Args:
            models: (m,) indices.
            times: (k,) how often each item was drawn.

        Returns:
            (Q, m) and (Q,). Of a query of one item, the draws of the item count; one of several counts once.
        """
        count = np.bincount(self.groups, weights=times, minlength=self.queries)
        size = np.bincount(self.groups, minlength=self.queries)
        share = np.zeros((self.queries, len(times)))
        share[self.groups, np.arange(len(times))] = times / np.maximum(count, 1)[self.groups]
        return share @ self.items[models].T, np.where(size == 1, count, (count > 0).astype(float))

    def whole(self) -> Measured:
        """The same with all items as one query."""
        return Measured(self.items, np.zeros_like(self.groups))


def standard_ranks(rows: np.ndarray) -> np.ndarray:
    """Mean ranks of each row of (a, m), shifted and scaled so that a product of two is Spearman's ρ; 0 if constant."""
    ranks = stats.rankdata(rows, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return np.divide(ranks, norm, out=np.zeros_like(ranks), where=norm > 0)


def lds(
    predicted: Mapping[str, np.ndarray], outcome: Measured, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """The LDS of several scores over the same models, all with the same draws.

    Args:
        predicted: name -> (M, Q), or (M, 1) where the score doesn't know queries: summed scores of each model's rows.
        outcome: what was measured.
        resamples: bootstrap draws of models and items.
        seed: of the draws.

    Returns:
        By name, ρ averaged over queries and its 95 % interval; `n` is M. NaN where no query's outcome varies.

    Raises:
        ValueError: shapes that don't fit, fewer than three models, or a number that is not finite.
    """
    value, draws = lds_draws(predicted, outcome, resamples=resamples, seed=seed)
    ends = {name: np.percentile(draws[name], ENDS) if len(draws[name]) else (np.nan, np.nan) for name in value}
    m = len(outcome.items)
    return {name: Interval(value[name], float(ends[name][0]), float(ends[name][1]), m) for name in value}


def lds_draws(
    predicted: Mapping[str, np.ndarray], outcome: Measured, *, resamples: int = 1000, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What `lds` makes intervals of: by name, ρ and its bootstrap draws (resamples,), the same draws for all scores.

    The interval of a difference is that of the draws' differences. Where no query's outcome varies ρ is NaN and there
    are no draws.
    """
    m, k = outcome.items.shape
    sums = {name: np.asarray(values, dtype=np.float64) for name, values in predicted.items()}
    for name, values in sums.items():
        if values.shape not in ((m, 1), (m, outcome.queries)):
            raise ValueError(f"{name}: predictions {values.shape} of {m} models and {outcome.queries} queries")
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: a prediction is NaN or infinite")
    if m < 3 or k == 0:
        raise ValueError(f"{m} models and {k} items: at least three models and one item")
    if not np.isfinite(outcome.items).all():
        raise ValueError("a measured outcome is NaN or infinite")

    columns = np.concatenate(list(sums.values()), axis=1).T  # ranked at once: a draw's time is that of its calls
    ends_at = np.cumsum([values.shape[1] for values in sums.values()])[:-1]

    def rho(models: np.ndarray, times: np.ndarray) -> dict[str, float]:
        values, weights = outcome.by_query(models, times)
        ranks = standard_ranks(values)
        parts = np.split(standard_ranks(columns[:, models]), ends_at)
        each = {name: (part * ranks).sum(axis=1) for name, part in zip(sums, parts, strict=True)}
        return {name: float((r * weights).sum() / weights.sum()) for name, r in each.items()}

    everything, once = np.arange(m), np.ones(k)
    value = rho(everything, once)
    if not np.ptp(outcome.by_query(everything, once)[0], axis=1).any():
        return dict.fromkeys(sums, np.nan), {name: np.zeros(0) for name in sums}
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        models, items = (np.asarray(rng.integers(0, size, size=size)) for size in (m, k))
        draws.append(rho(models, np.bincount(items, minlength=k).astype(float)))
    return value, {name: np.array([draw[name] for draw in draws]) for name in sums}


def between_seeds(first: Measured, second: Measured, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """How far two trainings of the same subsets agree, as `lds`: one seed's outcomes take the predictions' place.

    A score that knew each subset's expected outcome would reach about the square root of it (`noise_ceiling`).

    Args:
        first: of one seed.
        second: of the other seed, the same subsets and items.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    other = second.by_query(np.arange(len(second.items)), np.ones(second.items.shape[1]))[0].T
    return lds({"second": other}, first, resamples=resamples, seed=seed)["second"]


def noise_ceiling(reliability: float) -> float:
    """√r: what the expected outcome itself scores against one training each, if two trainings agree at r.

    With outcome = expectation + noise, r = var(expectation) / var(outcome), and the correlation of the expectation with
    one outcome is √r. 0 where r is negative; NaN stays.
    """
    return float(np.sqrt(max(reliability, 0.0))) if np.isfinite(reliability) else float("nan")


def parts_in_order(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Spearman of a part's place with its outcome, and the two-sided permutation p-value.

    Args:
        values: (d,) outcomes, larger is better, of the models trained on the parts, best-scored part first.
        seed: of the permutations.

    Returns:
        ρ, positive where better-scored parts train better models, and p; NaN and NaN where all outcomes are equal.
    """
    place = standard_ranks(-np.arange(len(values), dtype=np.float64)[None])[0]
    ranks = standard_ranks(np.asarray(values, dtype=np.float64)[None])[0]
    if not ranks.any():
        return float("nan"), float("nan")
    observed = float(place @ ranks)
    drawn = np.random.default_rng(seed).permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1) @ place
    return observed, (1 + int((np.abs(drawn) >= abs(observed) - 1e-12).sum())) / (1 + PERMUTATIONS)
