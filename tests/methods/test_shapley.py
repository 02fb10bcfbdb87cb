"""Shapley values against enumeration of all coalitions, and the axioms."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.methods.in_run_shapley import in_run_shapley
from keepset.methods.knn_shapley import knn_shapley, shapley_of_similarities
from keepset.methods.tmc_shapley import tmc_shapley

SIMILARITIES = st.lists(st.floats(-1, 1), min_size=1, max_size=6)


def enumerate_shapley(n, utility):
    """Shapley's definition: the mean gain over all coalitions, by size."""
    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for rows in combinations(others, size):
                gain = utility(np.array([*rows, i])) - utility(np.array(rows, dtype=int))
                values[i] += gain / comb(n - 1, size) / n
    return values


def nearest(similarities, k):
    return lambda rows: np.sort(np.asarray(similarities)[rows])[::-1][:k].sum() / k


@settings(deadline=None)
@given(SIMILARITIES, st.integers(1, 8))
def test_knn_shapley_is_enumeration(similarities, k):
    values = shapley_of_similarities(np.array(similarities), k)
    np.testing.assert_allclose(values, enumerate_shapley(len(similarities), nearest(similarities, k)), atol=1e-12)


@given(SIMILARITIES, st.integers(1, 8), st.floats(-1, 1))
def test_knn_shapley_axioms(similarities, k, twin):
    game = np.array([*similarities, twin, twin])
    values = shapley_of_similarities(game, k)
    assert values.sum() == pytest.approx(nearest(game, k)(np.arange(len(game))), abs=1e-9)  # efficiency
    assert values[-1] == pytest.approx(values[-2], abs=1e-12)  # symmetry
    null = shapley_of_similarities(np.append(np.abs(game), 0.0), k)
    assert null[-1] == pytest.approx(0, abs=1e-12)  # a null player
    order = np.argsort(-game, kind="stable")
    assert (np.diff(values[order]) <= 1e-12).all()  # nearer is worth at least as much


def test_knn_shapley_over_tasks_and_rows_without_direction():
    rng = np.random.default_rng(0)
    pool, queries = rng.normal(size=(6, 3)), rng.normal(size=(3, 3))
    pool[4] = 0
    scores, per_task = knn_shapley(pool, queries, ["b", "a", "b"], k=2)
    assert np.isnan(scores[4]) and np.isfinite(np.delete(scores, 4)).all()
    kept = np.delete(pool, 4, axis=0)
    cosines = (kept / np.linalg.norm(kept, axis=1, keepdims=True)) @ (
        queries / np.linalg.norm(queries, axis=1, keepdims=True)
    ).T
    by_query = [enumerate_shapley(5, nearest(cosines[:, m], 2)) for m in range(3)]
    np.testing.assert_allclose(np.delete(per_task, 4, axis=0)[:, 0], by_query[1])
    np.testing.assert_allclose(np.delete(per_task, 4, axis=0)[:, 1], (by_query[0] + by_query[2]) / 2)
    with pytest.raises(ValueError, match="at least 1"):
        shapley_of_similarities(np.ones(2), 0)


def saturating(weights):
    return lambda rows: float(np.sqrt(np.asarray(weights)[rows].sum()))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 100), st.booleans())
def test_monte_carlo_keeps_the_axioms_and_nears_enumeration(seed, antithetic):
    weights = np.random.default_rng(seed).gamma(1, 1, 6)
    weights[5] = 0  # a null player
    utility = saturating(weights)
    estimate = tmc_shapley(6, utility, permutations=200, antithetic=antithetic, seed=seed)
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


def test_in_run_shapley_is_enumeration_of_the_taylor_game():
    """Two steps on a quadratic target loss, where the second-order expansion is the loss itself."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    h = root @ root.T / 4
    theta, lr = rng.normal(size=4), np.array([0.3, 0.1])
    g = rng.normal(size=(2, 5, 4))
    in_batch = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=bool)

    def loss(x):
        return 0.5 * x @ h @ x

    dots, curvature, expected, first = np.zeros((2, 5, 1)), np.zeros((2, 5, 1)), np.zeros(5), np.zeros(5)
    for t in range(2):
        rows = np.flatnonzero(in_batch[t])

        def utility(some, t=t, rows=rows, theta=theta):
            return loss(theta) - loss(theta - lr[t] * g[t, rows[some]].sum(axis=0))

        expected[rows] += enumerate_shapley(len(rows), utility)
        step = g[t, rows].sum(axis=0)
        dots[t, :, 0], curvature[t, :, 0] = g[t] @ (h @ theta), g[t] @ h @ step
        first[rows] += lr[t] * dots[t, rows, 0]
        theta = theta - lr[t] * step
    np.testing.assert_allclose(in_run_shapley(dots, lr, in_batch, curvature)[0], expected, rtol=1e-10)
    np.testing.assert_allclose(in_run_shapley(dots, lr, in_batch)[0], first, rtol=1e-10)
    assert not np.allclose(first, expected)
    with pytest.raises(ValueError, match="don't fit"):
        in_run_shapley(dots, lr, in_batch.T)
