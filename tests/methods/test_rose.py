"""ROSE, LESS, TracIn and RDS as reductions, and what is true of top-k on their scores."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.methods.less import tracin
from keepset.methods.rose import checkpoint_parts, checkpoint_weights, rose
from keepset.methods.tasks import reduce_queries, reduce_tasks, task_columns
from keepset.selection.select import select

SCORES = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


def example(seed=0, c=3, n=7, p=11, shots=(2, 3)):
    """Return row gradients (c, n, p), pair gradients (c, m, p) and the pairs' tasks, unequal shots."""
    rng = np.random.default_rng(seed)
    tasks = np.repeat(["a", "b"], shots)
    scale = rng.gamma(1, 1, (c, len(tasks), 1))
    return rng.normal(size=(c, n, p)), rng.normal(size=(c, len(tasks), p)) * scale, tasks


def naive(rows, pairs, tasks, lr):
    """The official code's order with explicit loops: cosine, sum over checkpoints, mean over shots, max over tasks."""
    scores = []
    for i in range(rows.shape[1]):
        per_pair = []
        for m in range(pairs.shape[1]):
            total = 0.0
            for c in range(len(rows)):
                cosine = rows[c, i] @ pairs[c, m] / np.linalg.norm(rows[c, i]) / np.linalg.norm(pairs[c, m])
                total += lr[c] / sum(lr) * cosine
            per_pair.append(total)
        scores.append(max(np.mean([s for s, t in zip(per_pair, tasks, strict=True) if t == k]) for k in set(tasks)))
    return np.array(scores)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_one_mean_unit_vector_a_task_is_the_mean_of_cosines():
    rows, pairs, tasks = example()
    lr = np.array([2e-5, 1.3e-5, 4e-6])
    targets = np.stack([unit(pairs)[:, tasks == t].mean(axis=1) for t in ("a", "b")], axis=1)
    scores, per_task = rose(np.einsum("cnp,cjp->cnj", rows, targets), np.linalg.norm(rows, axis=-1), lr)
    np.testing.assert_allclose(scores, naive(rows, pairs, tasks, lr), rtol=1e-12)
    np.testing.assert_allclose(per_task.max(axis=1), scores)


def test_normalising_a_pair_or_a_task_are_different_targets():
    rows, pairs, tasks = example(p=200, shots=(4, 4))
    norms = np.linalg.norm(rows, axis=-1)
    of_pairs = np.stack([unit(pairs)[:, tasks == t].mean(axis=1) for t in ("a", "b")], axis=1)
    of_tasks = unit(np.stack([pairs[:, tasks == t].mean(axis=1) for t in ("a", "b")], axis=1))
    a, b = (rose(np.einsum("cnp,cjp->cnj", rows, v), norms)[0] for v in (of_pairs, of_tasks))
    assert np.abs(a - b).max() > 0.01


@given(st.floats(1e-6, 1e6), st.lists(st.floats(0.1, 1e4), min_size=2, max_size=2))
def test_cosine_forgets_scale_and_lr_only_counts_relative(scale, lr):
    rows, pairs, tasks = example(c=2)
    dots = np.einsum("cnp,cmp->cnm", rows, pairs)
    norms, lr = np.linalg.norm(rows, axis=-1), np.array(lr)
    expected = rose(dots, norms, lr)[0]
    np.testing.assert_allclose(rose(dots * scale, norms * scale, lr)[0], expected, rtol=1e-9)
    np.testing.assert_allclose(rose(dots, norms, lr * scale)[0], expected, rtol=1e-9)


def test_weights_of_the_published_learning_rates():
    """LESS's published mean learning rates, normalised by hand in our notes."""
    weights = checkpoint_weights(np.array([1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]), 4)
    np.testing.assert_allclose(weights, [0.4219, 0.3215, 0.1926, 0.0640], atol=6e-5)
    for bad in ([1.0], [0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="non-negative"):
            checkpoint_weights(np.array(bad), 2)


def test_dot_mean_and_zero_norm():
    dots, norms = np.array([[[1.0, 3.0], [0.0, 0.0]]]), np.array([[2.0, 0.0]])
    np.testing.assert_allclose(rose(dots, norms, cosine=False)[0], [3, 0])
    np.testing.assert_allclose(rose(dots, norms, reduce="mean")[0][0], 1.0)
    assert np.isnan(rose(dots, norms)[0][1])  # a zero gradient has no direction; it must not rank as 0
    np.testing.assert_allclose(checkpoint_parts(dots, norms)[0, 0], [0.5, 1.5])
    with pytest.raises(ValueError, match="don't fit"):
        rose(dots, norms.T)
    with pytest.raises(ValueError, match="'max' or 'mean'"):
        rose(dots, norms, reduce="sum")


def test_tracin_is_the_sum_over_steps_and_predicts_the_loss_drop():
    """On a quadratic validation loss, halving the step must quarter what the first-order prediction misses."""
    rng = np.random.default_rng(0)
    hessian = np.diag(rng.gamma(2, 1, 6))
    theta, g = rng.normal(size=6), rng.normal(size=6)

    def loss(x):
        return 0.5 * x @ hessian @ x

    missed = []
    for lr in (0.02, 0.01):
        predicted = tracin(np.array([[[g @ (hessian @ theta)]]]), np.array([lr]))[0][0]
        missed.append(loss(theta) - loss(theta - lr * g) - predicted)
        assert abs(missed[-1]) <= 0.5 * hessian.max() * lr**2 * (g @ g) + 1e-12
    assert missed[0] / missed[1] == pytest.approx(4, rel=1e-6)
    dots = rng.normal(size=(3, 4, 2))
    expected = sum(lr * dots[c].mean(axis=1) for c, lr in enumerate((0.3, 0.2, 0.1)))
    np.testing.assert_allclose(tracin(dots, np.array([0.3, 0.2, 0.1]))[0], expected)


# what is true of choosing by a fixed score


@given(SCORES)
def test_the_sum_of_scores_is_modular(scores):
    """f(A + z) − f(A) is the same for nested A: so it does not model redundancy, and a duplicate scores twice."""

    def f(rows):
        return sum(scores[i] for i in rows)

    small, large, z = {0}, set(range(len(scores) - 1)), len(scores) - 1
    small &= large
    assert f(small | {z}) - f(small) == pytest.approx(f(large | {z}) - f(large), abs=1e-9)


@given(SCORES, st.integers(1, 4))
def test_top_k_is_the_best_set_of_its_size(scores, k):
    k = min(k, len(scores))
    chosen = select(np.array(scores), [str(i) for i in range(len(scores))], ("rows", k))
    best = max(sum(scores[i] for i in subset) for subset in combinations(range(len(scores)), k))
    assert sum(scores[i] for i in chosen) == pytest.approx(best, abs=1e-9)


def test_the_max_over_tasks_of_a_sum_is_not_submodular_but_a_concave_sum_is():
    """F(A) = max_j Σ s_j gains more from b after a than before it: two rows of one task, against one of another."""
    s = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])

    def largest(rows):
        return s[list(rows)].sum(axis=0).max() if rows else 0.0

    before, after = largest({2, 1}) - largest({2}), largest({2, 0, 1}) - largest({2, 0})
    assert after == 1 > before == 0  # more gain in the larger set: the opposite of diminishing returns

    rng = np.random.default_rng(0)

    def concave(t, rows):
        return np.sqrt(t[list(rows)].sum(axis=0)).sum() if rows else 0.0

    for _ in range(50):
        t = rng.gamma(1, 1, (5, 2))
        assert concave(t, {0, 4}) - concave(t, {0}) >= concave(t, {0, 1, 2, 4}) - concave(t, {0, 1, 2}) - 1e-12


def test_projected_dot_products_err_as_one_over_root_d():
    """Rademacher projection (which LESS and ROSE use and we do not need): the error halves when d grows fourfold."""
    rng = np.random.default_rng(0)
    a, b = unit(rng.normal(size=(200, 400))), unit(rng.normal(size=(200, 400)))
    exact = (a * b).sum(axis=1)
    errors = []
    for d in (64, 256, 1024):
        signs = rng.choice([-1.0, 1.0], (400, d)) / np.sqrt(d)
        missed = ((a @ signs) * (b @ signs)).sum(axis=1) - exact
        errors.append(np.sqrt((missed**2).mean()))
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4


# tasks and RDS


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_queries_reduce_to_ragged_tasks(tasks):
    values = np.random.default_rng(0).normal(size=(4, len(tasks)))
    names, column = task_columns(tasks)
    reduced = reduce_queries(values, tasks)
    for j, name in enumerate(names):
        part = values[:, [t == name for t in tasks]]
        np.testing.assert_allclose(reduced[:, j], part.mean(axis=1))
    np.testing.assert_allclose(reduce_tasks(reduced, "mean"), reduced.mean(axis=1))
