"""LDS, its interval, the noise ceiling and deciles against loops over SciPy's own Spearman and planted truths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from keepset.evaluate.truth import Measured, between_seeds, lds, noise_ceiling, parts_in_order

ROWS, MODELS, QUERIES = 80, 60, 25


def planted(seed=0, noise=1.0):
    """Halves (M, n), the true weights (n, Q), and outcomes of two seeds: halves · weights + noise."""
    rng = np.random.default_rng(seed)
    kept = np.array([rng.permutation(ROWS) < ROWS // 2 for _ in range(MODELS)], dtype=float)
    common = rng.normal(size=(ROWS, 1))
    weights = common + rng.normal(size=(ROWS, QUERIES))
    truth = kept @ weights
    return kept, weights, [Measured(truth + noise * truth.std() * rng.normal(size=truth.shape), np.arange(QUERIES))
                           for _ in range(2)]  # fmt: skip


def slow(predicted, items, groups):
    """One query after the other."""
    rhos = []
    for q in sorted(set(groups)):
        outcome = items[:, groups == q].mean(axis=1)
        rhos.append(stats.spearmanr(predicted[:, min(q, predicted.shape[1] - 1)], outcome).statistic)
    return np.mean(rhos)


def test_the_value_is_that_of_a_loop():
    kept, weights, (outcome, _) = planted()
    scores = {"one": kept @ weights[:, :1], "each": kept @ weights}
    found = lds(scores, outcome, resamples=20)
    groups = np.arange(QUERIES) % 4
    grouped = lds({"one": scores["one"]}, Measured(outcome.items, groups), resamples=20)
    for name, predicted in scores.items():
        assert found[name].value == pytest.approx(slow(predicted, outcome.items, outcome.groups), abs=1e-12)
    assert grouped["one"].value == pytest.approx(slow(scores["one"], outcome.items, groups), abs=1e-12)
    whole = lds({"one": scores["one"]}, outcome.whole(), resamples=20)["one"].value
    assert whole == pytest.approx(stats.spearmanr(scores["one"][:, 0], outcome.items.mean(axis=1)).statistic)


def test_the_interval_is_that_of_a_loop_over_the_same_draws():
    kept, weights, (outcome, _) = planted()
    predicted = kept @ weights
    rng, drawn = np.random.default_rng(7), []
    for _ in range(40):
        models, items = rng.integers(0, MODELS, MODELS), rng.integers(0, QUERIES, QUERIES)
        drawn.append(
            np.mean([stats.spearmanr(predicted[models, q], outcome.items[models, q]).statistic for q in items])
        )
    found = lds({"x": predicted}, outcome, resamples=40, seed=7)["x"]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)


def test_true_weights_are_near_the_ceiling_random_ones_at_zero_and_negated_ones_below():
    kept, weights, (first, second) = planted(noise=0.3)
    rng = np.random.default_rng(1)
    scores = {"true": kept @ weights, "negated": -kept @ weights, "random": kept @ rng.normal(size=(ROWS, 1))}
    found = lds(scores, first)
    agree = between_seeds(first, second)
    ceiling = noise_ceiling(agree.value)
    assert found["true"].value > 0.9 and abs(found["true"].value - ceiling) < 0.03
    assert found["true"].low < ceiling < 1 and found["true"].value > agree.value
    assert found["negated"].value == pytest.approx(-found["true"].value)
    assert found["random"].low < 0 < found["random"].high


def test_a_random_score_lies_at_zero_as_often_as_its_interval_says():
    """Over 100 random scores the interval holds 0 in about 95 % of the cases."""
    kept, _, (outcome, _) = planted()
    rng = np.random.default_rng(3)
    found = lds({str(k): kept @ rng.normal(size=(ROWS, 1)) for k in range(100)}, outcome, resamples=300)
    assert 85 <= sum(one.low <= 0 <= one.high for one in found.values()) <= 100
    assert abs(np.mean([one.value for one in found.values()])) < 0.05


def test_the_ceiling_grows_with_less_noise():
    agreements = [between_seeds(*planted(noise=noise)[2], resamples=50).value for noise in (2.0, 1.0, 0.2)]
    assert agreements == sorted(agreements) and agreements[-1] > 0.9
    assert noise_ceiling(0.25) == 0.5 and noise_ceiling(-0.2) == 0.0 and np.isnan(noise_ceiling(np.nan))


def test_what_does_not_vary_orders_nothing():
    flat = Measured(np.ones((5, 3)), np.arange(3))
    assert np.isnan(lds({"x": np.arange(5.0)[:, None]}, flat)["x"].value)
    half = Measured(np.stack([np.arange(5.0), np.ones(5)], axis=1), np.arange(2))
    assert lds({"x": np.arange(5.0)[:, None]}, half, resamples=20)["x"].value == 0.5


@pytest.mark.parametrize(("predicted", "items", "message"), [
    (np.zeros((4, 2)), np.zeros((4, 3)), "predictions"), (np.full((4, 1), np.nan), np.zeros((4, 3)), "NaN"),
    (np.zeros((2, 1)), np.zeros((2, 3)), "three models"), (np.zeros((4, 1)), np.full((4, 3), np.inf), "infinite"),
])  # fmt: skip
def test_refusals(predicted, items, message):
    with pytest.raises(ValueError, match=message):
        lds({"x": predicted}, Measured(items, np.arange(3)))


def test_deciles_against_all_permutations():
    values = np.array([0.9, 0.7, 0.8, 0.2, 0.1, 0.3])
    rho, p = parts_in_order(values)
    assert rho == pytest.approx(stats.spearmanr(-np.arange(6), values).statistic)
    every = [abs(stats.spearmanr(np.arange(6), order).statistic) for order in itertools.permutations(range(6))]
    assert p == pytest.approx(np.mean(np.array(every) >= rho - 1e-12), abs=0.005)
    assert parts_in_order(-values)[0] == pytest.approx(-rho)
    assert np.isnan(parts_in_order(np.ones(4))).all()
