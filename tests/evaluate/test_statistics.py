"""Intervals and tests against SciPy and hand-worked numbers."""

import numpy as np
import pytest
from scipy import stats

from keepset.evaluate.statistics import (
    accuracy_power,
    bootstrap_ci,
    bootstrap_columns,
    bootstrap_ratio,
    correlations,
    holm,
    holm_by_label,
    items_needed,
    mean_and_spread,
    paired_bootstrap,
    paired_permutation,
    paired_test,
    smallest_difference,
    spearman,
    win_tie_loss,
)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).exponential(size=200)
    ours = bootstrap_ci(values, resamples=20_000, seed=3)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=4).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_same_seed_same_numbers_and_other_statistic():
    values = np.random.default_rng(1).normal(size=60)
    assert bootstrap_ci(values, seed=1) == bootstrap_ci(values, seed=1)
    assert bootstrap_ci(values, seed=1) != bootstrap_ci(values, seed=2)
    by_name = bootstrap_ci(values, seed=1, statistic=lambda v: v.mean(axis=-1))
    assert by_name.low == pytest.approx(bootstrap_ci(values, seed=1).low)
    median = bootstrap_ci(values, seed=1, statistic=lambda v: np.median(v, axis=-1))
    assert median.value == np.median(values) and median.low <= median.value <= median.high


def test_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum((ci := bootstrap_ci(rng.normal(size=40), resamples=400, seed=i)).low <= 0 <= ci.high for i in range(400))
    assert 0.90 <= hits / 400 <= 0.98


def test_stratified_draws_keep_group_sizes():
    # Two tasks, each constant: drawn inside tasks, nothing varies; drawn over everything, it does.
    values, tasks = np.array([0.0] * 5 + [1.0] * 15), np.array(["a"] * 5 + ["b"] * 15)
    inside = bootstrap_ci(values, groups=tasks)
    assert (inside.low, inside.value, inside.high) == (0.75, 0.75, 0.75)
    across = bootstrap_ci(values)
    assert across.low < 0.75 < across.high


def test_one_item_and_bad_input():
    one = bootstrap_ci([0.5])
    assert (one.low, one.high, one.n) == (0.5, 0.5, 1)
    for bad in ([], [1.0, np.nan], [[1.0]], [np.inf]):
        with pytest.raises(ValueError):
            bootstrap_ci(bad)
    with pytest.raises(ValueError, match="differ in length"):
        paired_bootstrap([1, 2], [1])


def test_permutation_by_hand_and_against_scipy():
    # Differences 1, 2, 3: of the 8 sign patterns only +++ and --- reach |6|.
    assert paired_permutation([1, 2, 3], [0, 0, 0]) == 2 / 8
    # Differences 1, -1: every pattern reaches 0.
    assert paired_permutation([1, 0], [0, 1]) == 1.0
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.25, 1, 60), rng.normal(0, 1, 60)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=20_000,
        vectorized=True, rng=1,
    ).pvalue  # fmt: skip
    assert paired_permutation(a, b, resamples=20_000, seed=2) == pytest.approx(theirs, abs=0.015)


def test_permutation_is_never_zero_and_identical_systems_are_one():
    assert 0 < paired_permutation(np.ones(50), np.zeros(50), resamples=500) <= 1 / 501 + 1e-12
    same = np.random.default_rng(0).normal(size=50)
    assert paired_permutation(same, same) == 1.0
    result = paired_test(same + 1, same)
    assert result.difference == pytest.approx(1) and result.p < 0.001 and result.low == pytest.approx(1)


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04, m = 4: .04, .06, .06 (not below the one before), .06.
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    named = holm_by_label({"a": 0.5, "b": 0.001, "c": float("nan")})
    assert named["b"] == pytest.approx(0.002) and named["a"] == 0.5 and np.isnan(named["c"])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError):
        holm([1.2])


def test_win_tie_loss_and_spread():
    assert win_tie_loss([3, 1, 1, 0], [1, 1, 2, 0]) == (1, 2, 1)
    assert win_tie_loss([3, 1.05, 1], [1, 1, 2], margin=0.1) == (1, 1, 1)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert np.isnan(mean_and_spread([1.0])[1])


def test_correlations_with_ties_and_constants():
    x, y = [1, 2, 2, 4, 5], [2, 1, 3, 3, 9]
    got = correlations(x, y)
    assert got.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = stats.rankdata(x), stats.rankdata(y)
    assert got.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3])) and np.isnan(correlations([1, 2], [2, 3]).pearson)


def test_columns_share_draws_and_ratio_by_hand():
    x = np.random.default_rng(2).normal(size=30)
    both = bootstrap_columns({"x": x, "minus": -x}, seed=4)
    assert both["x"] == bootstrap_ci(x, seed=4)
    assert both["minus"].low == pytest.approx(-both["x"].high)
    with pytest.raises(ValueError, match="differ in length"):
        bootstrap_columns({"x": x, "y": x[1:]})
    # 2 nats a token in every row: whatever is drawn, the ratio is 2.
    ratio = bootstrap_ratio([2.0, 20.0, 6.0], [1, 10, 3])
    assert ratio.value == 2 and ratio.low == pytest.approx(2) and ratio.high == pytest.approx(2)
    assert bootstrap_ratio([1.0, 30.0], [1, 10]).value == pytest.approx(31 / 11)
    with pytest.raises(ValueError, match="not positive"):
        bootstrap_ratio([1.0], [0])


def test_the_power_of_a_textbook_and_its_inverse():
    # (1.95996 + 0.84162)² = 7.8489: an effect of half a standard deviation takes 7.8489 / 0.25 = 31.4 pairs
    assert items_needed(0.5, 1.0) == 32
    assert smallest_difference(32, 1.0) == pytest.approx(np.sqrt(7.8489 / 32), rel=1e-4)
    for n in (1, 16, 36, 1000):
        assert items_needed(smallest_difference(n, 0.3), 0.3) == n
    assert smallest_difference(100, 1.0, alpha=0.01, power=0.9) == pytest.approx((2.57583 + 1.28155) / 10, rel=1e-4)
    for bad in (lambda: smallest_difference(0, 1.0), lambda: items_needed(0.0, 1.0), lambda: items_needed(1.0, -1.0)):
        with pytest.raises(ValueError):
            bad()


def test_few_pairs_tell_no_accuracies_apart():
    assert accuracy_power(0) is accuracy_power(15) is None
    assert accuracy_power(16) == pytest.approx((7.8489 / 16, np.sqrt(7.8489 * 0.5 / 16)), rel=1e-4)
    assert accuracy_power(16)[1] < 0.5


def test_the_test_finds_the_smallest_difference_as_often_as_it_says():
    """The permutation test itself on simulated losses, and on right or wrong answers at both ends of the range."""
    rng = np.random.default_rng(0)

    def found(draw, runs=300):
        return np.mean([paired_permutation(draw(), np.zeros(n), resamples=600, seed=i) < 0.05 for i in range(runs)])

    n = 40
    delta = smallest_difference(n, 1.0)
    assert found(lambda: rng.normal(delta, 1.0, n)) == pytest.approx(0.8, abs=0.07)
    n = 60
    best, independent = accuracy_power(n)
    assert found(lambda: (rng.random(n) < best) * 1.0) == pytest.approx(0.8, abs=0.09)
    up = (0.5 + independent) / 2
    assert found(lambda: rng.choice([1.0, -1.0, 0.0], n, p=[up, 0.5 - up, 0.5])) == pytest.approx(0.8, abs=0.09)
