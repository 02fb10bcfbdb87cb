"""Influence functions on a tiny transformer against a dense inverse of the same curvature, and of Gauss-Newton."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

torch = pytest.importorskip("torch")
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import ModelError, RecipeError  # noqa: E402
from keepset.features import curvature  # noqa: E402
from keepset.features.curvature import kronecker_factors, solve_target  # noqa: E402
from keepset.features.gauss_newton import GaussNewton  # noqa: E402
from keepset.features.influence import influence  # noqa: E402
from keepset.features.row_gradients import each_gradient, stacked_gradients, weighted_gradients  # noqa: E402
from keepset.features.solvers import ekfac_solve  # noqa: E402
from keepset.features.targets import target_vectors  # noqa: E402
from keepset.methods.datainf import datainf_solve  # noqa: E402
from keepset.methods.ekfac import corrected_eigenvalues  # noqa: E402
from keepset.methods.influence import dense_solve  # noqa: E402
from slow_gradients import flat, mean_nll_gradient  # noqa: E402
from tolerance import BACKWARD  # noqa: E402

R = 2  # 896 LoRA numbers: a dense matrix of them is small


@pytest.fixture(scope="module")
def world():
    peft = tiny_lora(tiny_model("llama"), r=R)
    rows, few = random_rows(30, seed=1, prefix=5), random_rows(4, seed=2)
    target = target_vectors(peft, [(r, None) for r in few], np.array([0, 0, 1, 1]), loss="sft", normalise="task")
    return peft, rows, target


def alone(peft, rows, names):
    """(n, p) by autograd, one row at a time."""
    return np.stack([flat(mean_nll_gradient(peft, names, row)) for row in rows])


def vectors(target):
    return np.stack([flat({n: b[k] for n, b in target.blocks.items()}) for k in range(target.n_targets)])


def test_conjugate_gradients_match_the_dense_inverse_of_gauss_newton(world) -> None:
    """The mean-token losses' own Gauss-Newton matrix: products, and the scores after the solve."""
    peft, _, target = world
    rows, names = random_rows(6, seed=5, longest=12), list(target.blocks)
    ggn = gauss_newton(peft, rows, names, power=1)
    product = GaussNewton(peft, rows, names, token_budget=40)
    u = np.random.default_rng(0).normal(size=len(ggn))
    np.testing.assert_allclose(product(u), ggn @ u, atol=5e-3 * np.abs(ggn @ u).max())
    assert not product(np.zeros(len(ggn))).any()
    solved = solve_target(peft, target, rows, solver="cg", damping=1.0, token_budget=40)
    pool = random_rows(40, seed=9)
    found = influence(peft, pool, solved, map="sgd").dots
    dots, v = alone(peft, pool, names), vectors(target)
    lams = np.geomspace(0.5, 2, 15) * np.trace(ggn) / 6  # λ rests on a draw of labels: the nearest must fit closely
    exact = [dots @ dense_solve(ggn, v, damping=lam).T for lam in lams]
    errors = [np.abs(found - e).max() / np.abs(e).max() for e in exact]
    assert min(errors) < 0.05 and 0 < int(np.argmin(errors)) < 14
    assert correlation(found, exact[int(np.argmin(errors))]) > 0.999


def gauss_newton(peft, rows, names, power=2):
    """Dense Gauss-Newton (p, p): mean over rows of Σ_t J_tᵀ (diag p − p pᵀ) J_t / T^power; drawn labels estimate 2."""
    parameters = dict(peft.named_parameters())
    chosen = {n: parameters[n].detach() for n in names}
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        mask = torch.from_numpy(row.supervised[1:])

        def logits(values, ids=ids, mask=mask):
            return torch.func.functional_call(peft, values, (ids,), {"use_cache": False}).logits[0, :-1][mask]

        with sdpa_kernel(SDPBackend.MATH):  # the only one with forward differentiation
            jac = torch.func.jacfwd(logits)(chosen)
        jac = torch.cat([jac[n].flatten(2) for n in names], 2).double()  # (T, V, p)
        p = logits(chosen).double().softmax(1)
        mean = torch.einsum("tv,tvp->tp", p, jac)
        total = total + torch.einsum("tv,tvp,tvq->pq", p, jac, jac).sub_(mean.T @ mean).numpy() / len(p) ** power
    return total / len(rows)


def test_whole_gradients_and_weighted_sums_are_autograds_whatever_the_batch(world) -> None:
    peft, rows, target = world
    slow = alone(peft, rows, list(target.blocks))
    for budget in (40, 2000):
        found = torch.cat(list(stacked_gradients(peft, rows, token_budget=budget).values()), 1).numpy()
        np.testing.assert_allclose(found, slow, atol=BACKWARD * np.abs(slow).max())
    weights = np.random.default_rng(0).normal(size=(30, 2))
    sums = flat({n: b.transpose(0, 1) for n, b in weighted_gradients(peft, rows, weights).items()})
    want = flat(
        {n: torch.as_tensor(weights.T @ g).view(2, *target.blocks[n].shape[1:]).transpose(0, 1)
         for n, g in zip(target.blocks, np.split(slow, splits(target), axis=1), strict=True)}
    )  # fmt: skip
    np.testing.assert_allclose(sums, want, atol=4 * BACKWARD * np.abs(want).max())


def splits(target):
    return np.cumsum([b[0].numel() for b in target.blocks.values()])[:-1]


def test_fisher_matches_the_dense_inverse(world) -> None:
    peft, rows, target = world
    slow = alone(peft, rows, list(target.blocks))
    lam = 0.1 * (slow**2).sum() / 30 / 30
    want = slow @ dense_solve(slow.T @ slow / 30, vectors(target), damping=lam).T
    solved = solve_target(peft, target, rows, solver="fisher", labels="data", damping=0.1, token_budget=100)
    found = influence(peft, rows, solved, map="sgd").dots
    np.testing.assert_allclose(found, want, atol=4 * BACKWARD * np.abs(want).max())
    plain = influence(peft, rows, target, map="sgd").dots
    assert abs(spearmanr(plain[:, 0], want[:, 0]).statistic) < 0.99  # the inverse changes the ranking


def test_datainf_and_ekfac_are_their_array_functions(world) -> None:
    peft, rows, target = world
    slow = np.split(alone(peft, rows, list(target.blocks)), splits(target), axis=1)
    tall = [b.flatten(1).numpy() for b in target.blocks.values()]
    solved = solve_target(peft, target, rows, solver="datainf", labels="data", token_budget=100)
    for found, want in zip(solved.blocks.values(), datainf_solve(tall, slow), strict=True):
        np.testing.assert_allclose(found.flatten(1).numpy(), want, atol=4 * BACKWARD * np.abs(want).max())

    bases = {}
    original = curvature.ekfac_solve

    def spy(v, q_a, q_b, values, *, damping):
        bases[len(bases)] = (q_a, q_b, values, damping)
        return original(v, q_a, q_b, values, damping=damping)

    curvature.ekfac_solve = spy
    try:
        solved = solve_target(peft, target, rows, solver="ekfac-matrix", labels="data", token_budget=100)
    finally:
        curvature.ekfac_solve = original
    for k, (found, v, g) in enumerate(zip(solved.blocks.values(), target.blocks.values(), slow, strict=True)):
        q_a, q_b, values, lam = bases[k]
        eigen = corrected_eigenvalues(g.reshape(-1, *v.shape[1:]), q_a, q_b)
        np.testing.assert_allclose(values, eigen, rtol=1e-3, atol=BACKWARD * eigen.max())
        assert lam == pytest.approx(0.1 * values.mean())
        want = ekfac_solve(v.numpy(), q_a, q_b, eigen)
        np.testing.assert_allclose(found.numpy(), want, atol=1e-3 * np.abs(want).max())


def test_kronecker_bases_diagonalise_the_factors_of_plain_autograd(world) -> None:
    """The factors are Σ a aᵀ and Σ δ δᵀ over tokens: checked at one matrix with forward and backward hooks."""
    peft, rows, target = world
    name = next(n for n in target.blocks if "layers.1" in n and "o_proj.lora_A" in n)
    factors = [f.numpy() for f in kronecker_factors(peft, rows, labels="data", token_budget=100)[name]]
    inputs, outputs = np.zeros_like(factors[0]), np.zeros_like(factors[1])
    module = dict(peft.named_modules())[name.removesuffix(".weight")]
    seen = {}
    hook = module.register_forward_hook(lambda m, x, y: seen.update(x=x[0][0], y=y))
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logps = peft(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        nll = -logps.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(row.supervised[1:])].mean()
        (delta,) = torch.autograd.grad(nll, seen["y"])
        last = int(np.flatnonzero(row.supervised).max())  # positions after the last predicting one don't run
        a = seen["x"][:last].detach().double().numpy()
        inputs += a.T @ a
        outputs += (delta[0].double().T @ delta[0].double()).numpy()
    hook.remove()
    np.testing.assert_allclose(factors[0], inputs, atol=4 * BACKWARD * np.abs(inputs).max())
    np.testing.assert_allclose(factors[1], outputs, atol=4 * BACKWARD * np.abs(outputs).max())


def dense(world, n):
    """n short rows, their dense Gauss-Newton matrix, and the gradients of 40 others."""
    peft, _, target = world
    rows = random_rows(n, seed=5, longest=12)
    return (
        rows,
        gauss_newton(peft, rows, list(target.blocks)),
        alone(peft, random_rows(40, seed=9), list(target.blocks)),
    )


def correlation(a, b):
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True)]))


def test_drawn_labels_estimate_gauss_newton_without_bias(world) -> None:
    peft, _, target = world
    rows, ggn, _ = dense(world, 12)
    sampled, v = [], torch.as_tensor(vectors(target))
    for seed in range(20):
        g = torch.cat(list(stacked_gradients(peft, rows, labels="sampled", seed=seed).values()), 1).double()
        sampled.append([float(g.square().sum()) / len(rows), *((g @ v.T).square().mean(0).tolist())])
    want = [np.trace(ggn), *np.einsum("jp,pq,jq->j", v.numpy(), ggn, v.numpy())]
    error = np.std(sampled, axis=0) / np.sqrt(len(sampled))
    assert (np.abs(np.mean(sampled, axis=0) - want) < 3 * error).all()
    assert (error < 0.1 * np.array(want)).all()  # so that a bias of a third would have shown


@pytest.mark.slow
def test_solvers_come_near_the_dense_inverse_of_gauss_newton(world) -> None:
    """At a damping of one mean eigenvalue; EK-FAC against the blocks and dampings that are its own, too."""
    peft, _, target = world
    rows, ggn, dots = dense(world, 30)
    v, pool = vectors(target), random_rows(40, seed=9)
    exact = dots @ dense_solve(ggn, v, damping=np.trace(ggn) / len(ggn)).T
    found = {s: influence(peft, pool, solve_target(peft, target, rows, solver=s, damping=1.0), map="sgd").dots
             for s in ("ekfac", "ekfac-matrix", "datainf")}  # fmt: skip
    assert correlation(found["ekfac"], exact) > 0.85
    edges = [0, *splits(target), len(ggn)]
    own = np.zeros_like(ggn)
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        own[a:b, a:b] = ggn[a:b, a:b] + np.eye(b - a) * np.trace(ggn[a:b, a:b]) / (b - a)
    blocks = dots @ np.linalg.solve(own, v.T)
    assert correlation(found["ekfac-matrix"], blocks) > 0.9
    assert correlation(found["datainf"], blocks) > 0.8
    assert correlation(dots @ v.T, blocks) < 0.8  # what no curvature has


def test_drawn_labels_hang_on_the_row_and_the_seed_alone(world) -> None:
    peft, rows, _ = world
    runs = [(rows, 60, 0), (rows, 2000, 0), (rows[::-1], 60, 0), (rows, 60, 1)]
    found = [torch.cat(list(stacked_gradients(peft, r, labels="sampled", token_budget=b, seed=s).values()), 1)
             for r, b, s in runs]  # fmt: skip
    scale = float(found[0].abs().max())
    assert torch.allclose(found[0], found[1], atol=BACKWARD * scale)
    assert torch.allclose(found[0], found[2].flip(0), atol=BACKWARD * scale)
    assert not torch.allclose(found[0], found[3], atol=1e-2 * scale)


def test_gpt2_and_refusals(world, monkeypatch) -> None:
    peft, rows, target = world
    other = tiny_lora(tiny_model("gpt2"), r=R)
    aim = target_vectors(other, [(r, None) for r in rows[:2]], np.array([0, 0]), loss="sft", normalise="task")
    for solver in ("fisher", "cg", "datainf", "ekfac"):
        solved = solve_target(other, aim, rows[:8], solver=solver)
        assert all(torch.isfinite(b).all() for b in solved.blocks.values())
    with pytest.raises(RecipeError, match="unknown curvature solver 'lu'"):
        solve_target(peft, target, rows, solver="lu")
    with pytest.raises(RecipeError, match="damping 0"):
        solve_target(peft, target, rows, solver="ekfac", damping=0)
    monkeypatch.setattr(curvature, "MEMORY", 4 * 896 * 10)
    with pytest.raises(RecipeError, match="set curvature_rows to at most 10"):
        solve_target(peft, target, rows, solver="fisher")


def test_a_matrix_without_gradient_is_left_out_and_none_at_all_is_refused() -> None:
    peft = tiny_lora(tiny_model("llama"), r=R)
    rows = random_rows(6, seed=3)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.zero_()  # lora_A has no gradient then
    target = target_vectors(peft, [(r, None) for r in rows[:2]], np.array([0, 0]), loss="sft", normalise="task")
    for solver in ("datainf", "ekfac"):
        solved = solve_target(peft, target, rows, solver=solver)
        assert all(b.any() != ("lora_A" in n) for n, b in solved.blocks.items())
    each: list[str] = []
    shapes = each_gradient(peft, rows, lambda n, i, g: each.append(n))
    assert set(each) == set(shapes)
    with torch.no_grad():
        for p in peft.parameters():
            p.zero_()
    for solver in ("fisher", "cg", "datainf", "ekfac"):
        with pytest.raises(ModelError, match="no gradient at all"):
            solve_target(peft, target, rows, solver=solver)
