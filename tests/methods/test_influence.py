"""Influence solvers against dense inverses and against leaving rows out and training again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from keepset.features.solvers import cg_solve, ekfac_solve
from oracles import corrected_eigenvalues, datainf, datainf_solve, dense_solve, influence, kronecker_bases

L2 = 0.05


def fit(x, y):
    """Logistic regression by its mean loss plus L2/2 ‖θ‖², to convergence."""

    def loss(theta):
        z = x @ theta * y
        p = expit(-z)
        return np.logaddexp(0, -z).mean() + L2 / 2 * theta @ theta, -(x * (y * p)[:, None]).mean(axis=0) + L2 * theta

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}).x


def logistic(seed=0, n=80, p=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + 40, p))
    y = np.where(expit(x @ rng.normal(size=p) * 2) > rng.random(n + 40), 1.0, -1.0)
    return x[:n], y[:n], x[n:], y[n:]


def gradients(x, y, theta):
    return -(x * (y * expit(-(x @ theta) * y))[:, None])


def hessian(x, theta):
    p = expit(x @ theta)
    return (x * (p * (1 - p))[:, None]).T @ x / len(x) + L2 * np.eye(x.shape[1])


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_influence_predicts_leaving_one_out(solver):
    x, y, x_val, y_val = logistic()
    theta = fit(x, y)
    h, v = hessian(x, theta), gradients(x_val, y_val, theta).mean(axis=0)[None]
    r = dense_solve(h, v) if solver == "dense" else cg_solve(lambda u: h @ u, v)
    # the regulariser's gradient is shared by all rows: removing a row removes its own loss only
    scores, _ = influence(gradients(x, y, theta) @ r.T)
    rise = []
    for i in range(len(x)):
        kept = np.arange(len(x)) != i
        # the same objective without row i: mean over n still, so that L2 weighs the same
        without = fit(np.where(kept[:, None], x, 0.0), y)
        rise.append(
            np.logaddexp(0, -(x_val @ without) * y_val).mean() - np.logaddexp(0, -(x_val @ theta) * y_val).mean()
        )
    r_value = np.corrcoef(scores, rise)[0, 1]
    slope = np.polyfit(scores / len(x), rise, 1)[0]
    assert r_value >= 0.95 and 0.8 < slope < 1.25, (r_value, slope)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12), st.floats(0.01, 10))
def test_conjugate_gradients_are_the_dense_solve(seed, p, damping):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(p, p))
    h, v = root @ root.T, rng.normal(size=(3, p))
    expected = v @ np.linalg.inv(h + damping * np.eye(p))
    np.testing.assert_allclose(dense_solve(h, v, damping=damping), expected, rtol=1e-6, atol=1e-9)
    solved = cg_solve(lambda u: h @ u, v, damping=damping, tolerance=1e-12)
    np.testing.assert_allclose(solved, expected, rtol=1e-4, atol=1e-6)


def test_conjugate_gradients_say_why_they_stop():
    v = np.ones((1, 3))
    with pytest.raises(ValueError, match="not positive at damping 0"):
        cg_solve(lambda u: -u, v)
    with pytest.raises(ValueError, match="after 1 steps"):
        cg_solve(lambda u: np.array([1.0, 2.0, 9.0]) * u, v, max_steps=1)
    assert not cg_solve(lambda u: u, np.zeros((1, 3))).any()


def test_datainf_is_its_definition_and_exact_for_one_row():
    rng = np.random.default_rng(0)
    g, v = [rng.normal(size=(12, 5)), rng.normal(size=(12, 3))], [rng.normal(size=(2, 5)), rng.normal(size=(2, 3))]
    for solved, layer_g, layer_v in zip(datainf_solve(v, g), g, v, strict=True):
        lam = 0.1 * (layer_g**2).sum() / layer_g.size
        eye = lam * np.eye(layer_g.shape[1])
        mean_inverse = np.mean([np.linalg.inv(np.outer(x, x) + eye) for x in layer_g], axis=0)
        np.testing.assert_allclose(solved, layer_v @ mean_inverse, rtol=1e-9)
    one = [rng.normal(size=(1, 5))]
    lam = 0.1 * (one[0] ** 2).sum() / 5
    exact = dense_solve(one[0].T @ one[0], v[0], damping=lam)
    np.testing.assert_allclose(datainf_solve(v[:1], one)[0], exact, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_datainf_is_nearer_to_the_dense_inverse_than_no_inverse_at_all(seed):
    """By little at the paper's damping (about 0.87 against 0.86); with more damping the swap gets good."""
    x, y, x_val, y_val = logistic(seed)
    theta = fit(x, y)
    g, v = gradients(x, y, theta), gradients(x_val, y_val, theta).mean(axis=0)[None]
    for damping, least in ((0.1, 0.85), (1.0, 0.95), (10.0, 0.999)):
        lam = damping * (g**2).sum() / g.size
        dense = (g @ dense_solve(g.T @ g / len(g), v, damping=lam).T)[:, 0]
        near = np.corrcoef(datainf([g], [v], damping=damping)[:, 0], dense)[0, 1]
        assert near > max(least, np.corrcoef((g @ v.T)[:, 0], dense)[0, 1])
    sample = datainf([g], [v], curvature=[g[::2]])
    assert np.corrcoef(sample[:, 0], datainf([g], [v])[:, 0])[0, 1] > 0.9


def test_ekfac_is_exact_when_the_curvature_is_a_kronecker_product():
    rng = np.random.default_rng(0)
    n, out, inp = 4000, 3, 4
    a = rng.normal(size=(n, inp)) @ rng.normal(size=(inp, inp))
    d = rng.normal(size=(n, out)) @ rng.normal(size=(out, out))
    g = np.einsum("no,ni->noi", d, a)
    q_a, q_b = kronecker_bases(a, d)
    eigenvalues = corrected_eigenvalues(g, q_a, q_b)
    v = rng.normal(size=(2, out, inp))
    solved = ekfac_solve(v, q_a, q_b, eigenvalues, damping=0.5)
    factor = np.kron(d.T @ d / n, a.T @ a / n)  # the exact mean of the outer products, as a and d are independent
    dense = dense_solve(factor, v.reshape(2, -1), damping=0.5).reshape(v.shape)
    assert np.corrcoef(solved.ravel(), dense.ravel())[0, 1] > 0.999
    assert np.abs(solved - dense).max() < 0.1 * np.abs(dense).max()


def test_ekfac_eigenvalues_are_the_diagonal_of_the_fisher_in_the_basis():
    """With any data, EK-FAC's Λ is the best diagonal in its basis: it equals that of the true Fisher."""
    rng = np.random.default_rng(1)
    a, d = rng.normal(size=(30, 2, 4)), rng.normal(size=(30, 2, 3))  # two tokens a row
    g = np.einsum("nto,nti->noi", d, a)
    q_a, q_b = kronecker_bases(a.reshape(-1, 4), d.reshape(-1, 3))
    basis = np.kron(q_b, q_a)
    flat = g.reshape(30, -1)
    fisher = flat.T @ flat / 30
    np.testing.assert_allclose(corrected_eigenvalues(g, q_a, q_b).ravel(), np.diag(basis.T @ fisher @ basis), rtol=1e-9)
    halves = [corrected_eigenvalues(part, q_a, q_b) for part in (g[:10], g[10:])]
    np.testing.assert_allclose((10 * halves[0] + 20 * halves[1]) / 30, corrected_eigenvalues(g, q_a, q_b))
    eigenvalues = np.full((3, 4), 2.0)
    v = rng.normal(size=(1, 3, 4))
    np.testing.assert_allclose(ekfac_solve(v, q_a, q_b, eigenvalues), v / 2.2)  # a round Fisher only rescales
