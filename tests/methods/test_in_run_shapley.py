"""In-run Shapley is the Shapley value of the game it approximates."""

import numpy as np

from oracles import enumerate_shapley, in_run_shapley


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
