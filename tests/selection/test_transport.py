"""Optimal transport as a choice: against a linear program, a general minimiser, and numbers worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from keepset.recipe import SelectSpec
from keepset.selection.select import select
from keepset.selection.transport import LOOSE, C, density, knn_kde, nearest_rows, scaled, transport


def columns(n=9, m=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, m)), [f"{i:02d}" for i in range(n)], 1 + rng.gamma(1, 1, n)


def by_linear_program(values, rho, alpha):
    """TSDS's problem as it is written: unknowns γ(q, z) and the largest ρ γ."""
    n, m = values.shape
    distance = (1 - scaled(values)).T.ravel()
    objective = np.append(alpha / C * distance, (1 - alpha) * m)
    below = np.hstack([np.diag(np.tile(rho, m)), -np.ones((n * m, 1))])
    sums = np.hstack([np.kron(np.eye(m), np.ones(n)), np.zeros((m, 1))])
    found = linprog(objective, A_ub=below, b_ub=np.zeros(n * m), A_eq=sums, b_eq=np.full(m, 1 / m))
    return found.x[:-1].reshape(m, n).sum(axis=0), found.fun


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.5, 0.8, 0.95, 0.99]), st.integers(1, 4))
def test_knn_kde_is_the_linear_programs_optimum(seed, alpha, m):
    values, ids, rho = columns(m=m, seed=seed)
    expected, _ = by_linear_program(values, rho, alpha)
    np.testing.assert_allclose(knn_kde(values, nearest_rows(values, ids), rho, alpha=alpha), expected, atol=1e-8)


def test_knn_kde_by_hand():
    """Distances 0, 1/2, 1: reaching row 1 adds 1/2, row 2 then 2 · 1/2; α/C · 1.5 ≥ 1 − α from α = 1/1.3 on."""
    values, ids = np.array([[2.0], [1.0], [0.0]]), ["a", "b", "c"]
    nearest, ones = nearest_rows(values, ids), np.ones(3)
    assert knn_kde(values, nearest, ones, alpha=0.76).tolist() == pytest.approx([1 / 3] * 3)
    assert knn_kde(values, nearest, ones, alpha=0.78).tolist() == [0.5, 0.5, 0.0]
    assert knn_kde(values, nearest, ones, alpha=0.92).tolist() == [1.0, 0.0, 0.0]
    copies = np.array([2.0, 2.0, 1.0])  # a and b share what one row gets
    assert knn_kde(values, nearest, copies, alpha=0.05).tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_rows_beyond_the_limit_receive_nothing():
    values, ids, rho = columns(n=30)
    nearest = nearest_rows(values, ids, limit=4)
    mass = knn_kde(values, nearest, rho, alpha=0.01)
    assert set(np.flatnonzero(mass)) <= set(nearest.ravel()) and mass.sum() == pytest.approx(1)


def test_density_is_the_sum_over_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 3)) + 2
    vectors[4] = 5 * vectors[2]  # the same direction
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [sum(max(0, 1 - np.sum((a - b) ** 2) / 0.75**2) for b in unit) for a in unit]
    np.testing.assert_allclose(density(vectors, block=3), expected, atol=1e-5)
    assert density(vectors)[4] == density(vectors)[2] >= 2
    assert density(np.zeros((2, 3))).tolist() == [1, 1]


def objective(plan, cost, reg):
    """The unbalanced problem's value; plan (m, n) has its first marginal."""
    m, n = cost.shape

    def kl(a, b):
        return np.sum(a * np.log(a / b) - a + b)

    return np.sum(plan * cost) + reg * kl(plan, 1 / (m * n)) + LOOSE * kl(plan.sum(axis=0), np.full(n, 1 / n))


@pytest.mark.parametrize("reg", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_transport_is_the_minimum(reg, seed):
    values, _, _ = columns(n=6, m=2, seed=seed)
    cost = (1 - scaled(values).T) / 2

    def plan(x):
        e = np.exp(x.reshape(cost.shape) - x.reshape(cost.shape).max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True) / len(cost)

    best = minimize(lambda x: objective(plan(x), cost, reg), np.zeros(cost.size), tol=1e-14)
    mass = transport(values, reg=reg)
    np.testing.assert_allclose(mass, plan(best.x).sum(axis=0), atol=2e-4)
    assert mass.sum() == pytest.approx(1)


def test_with_little_entropy_each_query_sends_all_to_its_nearest_row():
    values = np.array([[1.0, 0.1], [0.5, 0.9], [0.2, -1.0]])  # the second column is divided by 1.0, the first by 1.0
    np.testing.assert_allclose(transport(values, reg=0.002), [0.5, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("policy", ["knn_kde", "transport"])
@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_a_columns_scale_is_no_matter_and_copies_tie(policy, seed):
    values, ids, _ = columns(n=20, seed=seed)
    values[1] = values[0]
    vectors = np.random.default_rng(seed).normal(size=(20, 4))
    vectors[1] = vectors[0]

    def chosen(values):
        spec = SelectSpec(policy=policy)
        return select(np.zeros(20), ids, ("rows", 20), spec=spec, per_task=values, embeddings=vectors).tolist()

    order = chosen(values)
    assert order == chosen(values * np.array([0.25, 4.0, 1024.0]))
    assert order.index(0) < order.index(1)  # equal but for the id
    assert sorted(order) == list(range(20))


def test_both_serve_every_query_where_top_k_serves_one():
    """Two clusters of 20 rows, one query each; the first query's similarities are higher throughout."""
    values = np.zeros((40, 2))
    values[:20, 0] = np.linspace(1, 0.9, 20)
    values[20:, 1] = values[:20, 0] / 2
    ids = [f"{i:02d}" for i in range(40)]
    vectors = np.eye(40)
    for policy in ("top_k", "knn_kde", "transport"):
        spec = SelectSpec(policy=policy)
        of = select(values.max(axis=1), ids, ("rows", 10), spec=spec, per_task=values, embeddings=vectors)
        assert int((of < 20).sum()) == (10 if policy == "top_k" else 5)


def test_knn_kde_keeps_few_copies():
    """Ten copies of the nearest row weigh as one: the other near rows come before the copies."""
    values = np.concatenate([np.full(10, 1.0), np.linspace(0.99, 0.9, 5), np.zeros(20)])[:, None]
    ids = [f"{i:02d}" for i in range(35)]
    vectors = np.eye(35)
    vectors[:10] = vectors[0]
    spec = SelectSpec(policy="knn_kde", knn_alpha=0.9)
    of = select(values[:, 0], ids, ("rows", 5), spec=spec, per_task=values, embeddings=vectors)
    assert of.tolist() == [10, 11, 12, 13, 14]
