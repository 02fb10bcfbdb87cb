"""Validation gradients: DPO against TRL and finite differences, what beta and the reference can and can't change."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import ModelError, RecipeError  # noqa: E402
from keepset.features.targets import concatenate, target_vectors  # noqa: E402
from slow_gradients import flat, gradient, token_logps  # noqa: E402
from tolerance import BACKWARD, FORWARD, MAPPED  # noqa: E402


def setup(architecture="llama", n=5, seed=21):
    rows = random_rows(2 * n, seed=seed)
    return tiny_lora(tiny_model(architecture)), [(rows[2 * i], rows[2 * i + 1]) for i in range(n)]


def vectors(target):
    return np.stack([flat({n: b[k] for n, b in target.blocks.items()}) for k in range(target.n_targets)])


def summed_margin(model, pair):
    return token_logps(model, pair[0]).sum() - token_logps(model, pair[1]).sum()


def mean_gap(model, pair):
    return token_logps(model, pair[1]).mean() - token_logps(model, pair[0]).mean()


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def dpo_gradient(model, pair, beta, reference, names):
    """Autograd through −log σ(β·Δ) as written, in the model's precision."""
    with torch.no_grad():
        if reference == "base":
            with model.disable_adapter():
                refs = [token_logps(model, side).sum() for side in pair]
        else:
            refs = [token_logps(model, side).sum() if reference == "checkpoint" else torch.zeros(()) for side in pair]

    def loss():
        w, l = (token_logps(model, side).sum() - ref for side, ref in zip(pair, refs, strict=True))
        return -F.logsigmoid(beta * (w - l))

    return gradient(model, names, loss)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("llama", "base"), ("llama", "checkpoint"), ("llama", "none"), ("gpt2", "base"), ("gemma3", "base")],
)
def test_dpo_per_task_is_the_gradient_of_the_dpo_loss(kind, reference) -> None:
    model, pairs = setup(kind, n=3)
    tasks = np.array([0, 0, 1])
    target = target_vectors(
        model, pairs, tasks, loss="dpo", beta=0.3, reference=reference, normalise="task", token_budget=50
    )
    names = list(target.blocks)
    each = np.stack([flat(dpo_gradient(model, p, 0.3, reference, names)) for p in pairs])
    want = unit(np.stack([each[tasks == t].mean(0) for t in (0, 1)]))
    assert np.abs(vectors(target) - want).max() < BACKWARD
    norms = np.exp(target.log_weight) * target.norms
    assert np.allclose(norms, np.linalg.norm(each, axis=1), rtol=MAPPED)


def test_dpo_pair_gradient_against_finite_differences() -> None:
    model, pairs = setup("gpt2", n=1)  # float64 throughout: Llama's norm would round to float32
    model = model.double()
    target = target_vectors(model, pairs, np.array([0]), beta=0.2, reference="base", normalise="task")
    names = list(target.blocks)
    want = flat(dpo_gradient(model, pairs[0], 0.2, "base", names))
    scale = float(np.exp(target.log_weight[0]) * target.norms[0])
    assert np.abs(vectors(target)[0] * scale - want).max() <= 1e-6 * np.abs(want).max()
    # central differences of the loss along three directions, float64
    parameters = dict(model.named_parameters())
    with torch.no_grad(), model.disable_adapter():
        refs = [float(token_logps(model, side).sum()) for side in pairs[0]]

    def loss() -> float:
        with torch.no_grad():
            w, l = (float(token_logps(model, side).sum()) - ref for side, ref in zip(pairs[0], refs, strict=True))
        return float(-F.logsigmoid(torch.tensor(0.2 * (w - l), dtype=torch.float64)))

    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        direction = {n: torch.randn(parameters[n].shape, generator=generator, dtype=torch.float64) for n in names}
        ends = []
        for h in (1e-5, -2e-5):
            for n in names:
                parameters[n].data.add_(direction[n], alpha=h)
            ends.append(loss())
        for n in names:
            parameters[n].data.add_(direction[n], alpha=1e-5)
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope == pytest.approx(float(flat(direction) @ (vectors(target)[0] * scale)), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama"])
def test_beta_and_reference_cancel_per_pair_but_not_per_task(architecture) -> None:
    """rose.md 2.4: each pair's DPO gradient is a positive number times a vector free of beta and reference."""
    model, pairs = setup(architecture)
    tasks = np.array([0, 0, 0, 1, 1])
    found = {
        (normalise, beta, reference): vectors(
            target_vectors(model, pairs, tasks, beta=beta, reference=reference, normalise=normalise)
        )
        for normalise in ("pair", "task")
        for beta in (0.01, 1.0, 5.0)
        for reference in ("base", "checkpoint", "none")
    }
    first = found["pair", 0.01, "base"]
    assert all(np.abs(v - first).max() < FORWARD for k, v in found.items() if k[0] == "pair")
    last = unit(found["task", 5.0, "none"])
    cosines = [float((unit(v) * last).sum(1).min()) for k, v in found.items() if k[0] == "task"]
    assert min(cosines) < 0.99


def test_mean_of_unit_gradients_gives_the_mean_of_cosines() -> None:
    model, pairs = setup()
    target = target_vectors(model, pairs, np.zeros(5, int), loss="margin")
    names = list(target.blocks)
    each = np.stack([flat(gradient(model, names, lambda p=p: -summed_margin(model, p))) for p in pairs])
    assert np.abs(vectors(target)[0] - unit(each).mean(0)).max() < BACKWARD
    assert np.allclose(target.norms, np.linalg.norm(each, axis=1), rtol=BACKWARD)
    margins = [float(summed_margin(model, p).detach()) for p in pairs]
    assert np.allclose(target.margin, margins, rtol=MAPPED, atol=MAPPED)


def test_sft_and_mean_margin() -> None:
    model, pairs = setup("gpt2")
    target = target_vectors(model, [(w, None) for w, _ in pairs], np.arange(5), loss="sft", normalise="task")
    names = list(target.blocks)
    for k, (w, l) in enumerate(pairs):
        want = flat(gradient(model, names, lambda w=w: -token_logps(model, w).mean()))
        assert np.abs(vectors(target)[k] - unit(want)).max() < BACKWARD
        both = flat(gradient(model, names, lambda p=(w, l): mean_gap(model, p)))
        found = target_vectors(model, [(w, l)], np.array([0]), loss="mean_margin")
        assert np.abs(vectors(found)[0] - unit(both)).max() < BACKWARD
    assert np.isnan(target.margin).all()


def test_easy_pairs_never_underflow() -> None:
    """beta·sigma(-beta·Delta) of e^-2000 is 0 in any float; the vector is whole all the same, its log weight known."""
    model, pairs = setup(n=3)
    target = target_vectors(model, pairs, np.array([0, 1, 2]), beta=1e4, reference="none", normalise="task")
    assert target.log_weight.min() < -800
    assert np.allclose(np.linalg.norm(vectors(target), axis=1), 1, atol=FORWARD)
    gentle = target_vectors(model, pairs, np.array([0, 1, 2]), beta=1e-3, reference="none", normalise="task")
    assert np.abs(vectors(gentle) - vectors(target)).max() < FORWARD


def test_equal_sides_are_left_out_and_named() -> None:
    model, pairs = setup()
    same = [*pairs[:2], (pairs[2][0], pairs[2][0]), (pairs[3][0], pairs[3][0])]
    target = target_vectors(model, same, np.array([0, 0, 0, 1]), token_budget=64)
    assert target.zero_pairs.tolist() == [2, 3] and target.empty.tolist() == [False, True]
    without = target_vectors(model, pairs[:2], np.array([0, 0]), token_budget=64)
    assert np.allclose(vectors(target)[0], vectors(without)[0], atol=FORWARD)


@pytest.mark.parametrize("normalise", ["pair", "task"])
def test_budgets_and_order_change_nothing(normalise) -> None:
    model, pairs = setup("gemma3", n=6)
    tasks = np.array([0, 1, 0, 2, 1, 0])
    want = vectors(target_vectors(model, pairs, tasks, normalise=normalise))
    order = np.array([3, 5, 0, 1, 4, 2])
    for budget in (1, 64, 4096):
        again = target_vectors(model, [pairs[i] for i in order], tasks[order], normalise=normalise, token_budget=budget)
        assert np.abs(vectors(again) - want).max() < BACKWARD


def test_concatenate_puts_targets_side_by_side() -> None:
    model, pairs = setup()
    a = target_vectors(model, pairs, np.array([0, 0, 1, 1, 1]))
    b = target_vectors(model, pairs, np.zeros(5, int), loss="sft")
    both = concatenate([a, b])
    assert both.n_targets == 3 and np.array_equal(vectors(both), np.concatenate([vectors(a), vectors(b)]))
    assert both.tasks.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_the_adapter_and_its_flags_survive_the_reference_pass() -> None:
    model, pairs = setup()
    for p in model.parameters():
        p.requires_grad_(False)
    target_vectors(model, pairs, np.zeros(5, int), reference="base", normalise="task")
    assert not any(p.requires_grad for p in model.parameters())


def test_refusals() -> None:
    model, pairs = setup()
    with pytest.raises(RecipeError, match="did you mean 'dpo'"):
        target_vectors(model, pairs, np.zeros(5, int), loss="dpoo")
    with pytest.raises(RecipeError, match="needs chosen and rejected"):
        target_vectors(model, [(pairs[0][0], None)], np.zeros(1, int))
    with pytest.raises(RecipeError, match="nothing to aim at"):
        target_vectors(model, [], np.zeros(0, int))
    with pytest.raises(RecipeError, match="beta"):
        target_vectors(model, pairs, np.zeros(5, int), beta=0)
    bare = tiny_model("llama")
    with pytest.raises(ModelError, match="adapter off"):
        target_vectors(bare, pairs, np.zeros(5, int), normalise="task", matrices=["*.layers.1.*"])
