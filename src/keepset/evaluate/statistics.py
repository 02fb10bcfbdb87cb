"""Intervals, tests and correlations; NumPy and SciPy only.

Every function that draws takes a seed and draws with `numpy.random.default_rng(seed)`, so a number in a report can be
made again. Arrays are (n,), one number an item; two systems have the same items. Nothing here drops a NaN: it raises,
because a mean over "what was left" is another quantity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# Rows of resampled indices held in memory at once: 4e6 int64 = 32 MB.
_CHUNK_ELEMENTS = 4_000_000
# Up to this many items all 2^n sign flips are gone through, so that the permutation p-value is exact.
_EXACT_ITEMS = 14
_LEVEL = 0.95
# Percentiles at the ends of an interval.
_ENDS = [100 * (1 - _LEVEL) / 2, 100 - 100 * (1 - _LEVEL) / 2]
# Standard errors that a two-sided test at 0.05 finds with a power of 0.8.
_DETECTABLE = float(stats.norm.isf(0.05 / 2) + stats.norm.ppf(0.8))


@dataclass(frozen=True)
class Interval:
    """A mean or ratio over items with its interval.

    Attributes:
        value: the mean or ratio over all items.
        low: lower end.
        high: upper end.
        n: items it rests on.
        level: nominal coverage.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = _LEVEL

    def as_dict(self) -> dict[str, float]:
        """Return the fields as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """`0.613 [0.542, 0.681]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Test:
    """A paired comparison: mean of a − b, its interval and a two-sided p-value."""

    __test__ = False  # not a pytest class

    difference: float
    low: float
    high: float
    p: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields as plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Correlation:
    """Pearson and Spearman correlation of two columns, with two-sided p-values (t approximation)."""

    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    n: int


def _finite(values: ArrayLike, name: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: one number an item is needed, the shape is {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: no items")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} are NaN or infinite")
    return array


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = _finite(a, "first"), _finite(b, "second")
    if first.size != second.size:
        raise ValueError(f"paired columns differ in length: {first.size} and {second.size}")
    return first, second


def _resampled_sums(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over bootstrap draws of n items, the same draws for each column. columns (m, n) -> (m, resamples)."""
    rng = np.random.default_rng(seed)
    m, n = columns.shape
    sums = np.zeros((m, resamples))
    step = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = rng.integers(0, n, (stop - start, n))
        for row in range(m):
            sums[row, start:stop] = columns[row][drawn].sum(axis=1)
    return sums


def bootstrap_ci(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean over items (Efron 1979).

    Returns the mean with its interval. One item has no spread: low = high = value.

    Raises:
        ValueError: empty, not one-dimensional, or not finite.
    """
    return bootstrap_columns({"values": values}, resamples=resamples, seed=seed)["values"]


def bootstrap_columns(columns: Mapping[str, ArrayLike], *, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """`bootstrap_ci` of several columns (n,) over the same items, with the same draws for each.

    Raises:
        ValueError: see `bootstrap_ci`; or the columns differ in length.
    """
    arrays = {name: _finite(values, name) for name, values in columns.items()}
    sizes = {a.size for a in arrays.values()}
    if len(sizes) != 1:
        raise ValueError(f"columns differ in length: { {name: a.size for name, a in arrays.items()} }")
    n = sizes.pop()
    means = _resampled_sums(np.stack(list(arrays.values())), resamples, seed) / n
    ends = np.percentile(means, _ENDS, axis=1)
    return {
        name: Interval(float(array.mean()), float(ends[0, i]), float(ends[1, i]), n)
        for i, (name, array) in enumerate(arrays.items())
    }


def bootstrap_ratio(numerator: ArrayLike, denominator: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Interval of sum(numerator) / sum(denominator) over items drawn together: a loss per token, for example.

    Raises:
        ValueError: different lengths, empty, not finite, or a denominator that is not positive.
    """
    top, bottom = _pair(numerator, denominator)
    if (bottom <= 0).any():
        raise ValueError("denominator: not positive everywhere")
    means = _resampled_sums(np.stack([top, bottom]), resamples, seed) / top.size
    low, high = np.percentile(means[0] / means[1], _ENDS)
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high), top.size)


def paired_permutation(a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of mean(a − b) ≠ 0 by flipping the signs of the differences (Fisher's randomisation test).

    Exact (all 2^n flips) up to 14 items; otherwise (1 + hits) / (1 + resamples), which is never 0. SciPy's
    `permutation_test` takes 7 to 40 times as long and splits ties where the observed sum is 0 but for rounding: it
    tells 0.89 instead of 1 for three times 0.1, 0.2, −0.3.

    Raises:
        ValueError: different lengths, empty or not finite.
    """
    first, second = _pair(a, b)
    difference = first - second
    n = difference.size
    observed = abs(difference.sum())
    # Sums that differ only by rounding count as equal, else a tie is decided by the order of addition.
    slack = 1e-12 * max(1.0, float(np.abs(difference).sum()))
    if n <= _EXACT_ITEMS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ difference) >= observed - slack).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    step = max(1, _CHUNK_ELEMENTS // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        flips = rng.integers(0, 2, (count, n), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(flips @ difference) >= observed - slack).sum())
    return (1 + hits) / (1 + resamples)


def paired_test(a: ArrayLike, b: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Test:
    """Return mean(a − b), its bootstrap interval (items drawn in pairs) and the permutation p-value.

    The permutation test takes at least 10,000 flips.

    Raises:
        ValueError: different lengths, empty or not finite.
    """
    first, second = _pair(a, b)
    interval = bootstrap_ci(first - second, resamples=resamples, seed=seed)
    p = paired_permutation(a, b, resamples=max(resamples, 10_000), seed=seed)
    return Test(interval.value, interval.low, interval.high, p, interval.n)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given.

    p₍ᵢ₎' = max over j ≤ i of min(1, (m − j + 1) · p₍ⱼ₎). NaN (a comparison that could not be made) stays NaN and does
    not count in m.

    Raises:
        ValueError: a p-value outside 0..1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise ValueError("a p-value lies outside 0..1")
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return out


def holm_by_label(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return `holm` of a mapping label -> p as a mapping."""
    return dict(zip(p_values, holm(list(p_values.values())).tolist(), strict=True))


def smallest_difference(n: int, sd: float) -> float:
    """Mean difference that a two-sided paired test of n items at 0.05 finds four times in five.

    (z(0.975) + z(0.8))·sd/√n, a normal approximation (Chow, Shao & Wang 2008, chapter 3). Of right or wrong answers sd²
    is at most the share of items that the two systems answer differently. `sd` is that of the items' differences, in
    the metric's unit.

    Raises:
        ValueError: n below 1, or a negative sd.
    """
    if n < 1 or not sd >= 0:
        raise ValueError(f"power of {n} items with standard deviation {sd}: at least 1 item and no negative sd")
    return _DETECTABLE * sd / math.sqrt(n)


def accuracy_power(n: int) -> tuple[float, float] | None:
    """Smallest difference of two accuracies on n items: at best, and where the answers are independent coin flips.

    With c = z(0.975) + z(0.8): at best the systems differ on no items but those that make the difference δ, so that sd²
    = δ and δ = c²/n; two independent systems at an accuracy of ½ differ on half of the items, sd² = ½. Returns Both,
    the smaller first; None where n is too small for either (below 16 items).
    """
    independent = smallest_difference(n, math.sqrt(0.5)) if n else math.inf
    return None if independent > 0.5 else (smallest_difference(n, 1.0) ** 2, independent)


def win_tie_loss(a: ArrayLike, b: ArrayLike) -> tuple[int, int, int]:
    """Count the items where a is better, equal and worse; larger is better."""
    first, second = _pair(a, b)
    wins, losses = int((first > second).sum()), int((first < second).sum())
    return wins, first.size - wins - losses, losses


MOST_AT_ONCE = 1 << 21
"""Items of which both columns are ranked at once."""


def correlations(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson and Spearman (ties get mean ranks). NaN where a column is constant or there are fewer than 3 items.

    Raises:
        ValueError: different lengths, empty or not finite.
    """
    first, second = _pair(x, y)
    n = first.size
    if n < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(np.nan, np.nan, np.nan, np.nan, n)
    pearson = stats.pearsonr(first, second)
    if n <= MOST_AT_ONCE:
        spearman = stats.spearmanr(first, second)
    else:  # the same, a column at a time: scipy's takes a hundred bytes an item
        first = stats.rankdata(first)
        spearman = stats.pearsonr(first, stats.rankdata(second))
    return Correlation(
        float(pearson.statistic), float(pearson.pvalue), float(spearman.statistic), float(spearman.pvalue), n
    )


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two columns (n,), mean ranks for ties; NaN where one is constant."""
    return correlations(x, y).spearman
