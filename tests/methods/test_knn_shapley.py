"""kNN-Shapley against enumeration of all coalitions, and the axioms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.methods.knn_shapley import knn_shapley, shapley_of_similarities
from oracles import enumerate_shapley

SIMILARITIES = st.lists(st.floats(-1, 1), min_size=1, max_size=6)


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
