"""Monte-Carlo Shapley against enumeration of all coalitions, and the axioms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.methods.tmc_shapley import tmc_shapley
from oracles import enumerate_shapley


def saturating(weights):
    return lambda rows: float(np.sqrt(np.asarray(weights)[rows].sum()))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 100))
def test_monte_carlo_keeps_the_axioms_and_nears_enumeration(seed):
    weights = np.random.default_rng(seed).gamma(1, 1, 6)
    weights[5] = 0  # a null player
    utility = saturating(weights)
    estimate = tmc_shapley(6, utility, permutations=200, seed=seed)
    assert estimate.values.sum() == pytest.approx(
        utility(np.arange(6)) - utility(np.zeros(0, int))
    )  # efficiency, always
    assert estimate.values[5] == pytest.approx(0, abs=1e-12)
    error = np.abs(estimate.values - enumerate_shapley(6, utility))
    assert (error <= 5 * estimate.standard_errors + 1e-12).all()
    assert estimate.evaluations <= 2 + 200 * 5


def test_every_order_walked_is_exact_and_equal_players_get_equal_shares():
    weights = np.array([1.0, 1.0, 4.0])
    exact = enumerate_shapley(3, saturating(weights))
    estimate = tmc_shapley(3, saturating(weights), permutations=20_000, seed=0)
    np.testing.assert_allclose(estimate.values, exact, atol=0.01)
    assert abs(estimate.values[0] - estimate.values[1]) < 0.02


def test_truncation_saves_calls_for_a_bounded_error():
    weights = np.random.default_rng(0).gamma(1, 1, 20)

    def capped(rows):
        return min(1.0, float(weights[rows].sum()))

    full = tmc_shapley(20, capped, permutations=100, seed=1)
    short = tmc_shapley(20, capped, permutations=100, seed=1, tolerance=1e-9)
    assert short.evaluations < 0.5 * full.evaluations
    np.testing.assert_allclose(short.values, full.values, atol=1e-12)
    with pytest.raises(ValueError, match="at least 4 permutations"):
        tmc_shapley(3, capped, permutations=2)
