"""The derivative of a whole training against finite differences of it: every weight moved, the run made again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from safetensors.torch import load_file  # noqa: E402

import architectures  # noqa: E402
from conftest import random_rows, tiny_model, tiny_tokenizer  # noqa: E402
from keepset.features.metagradient import (  # noqa: E402
    Adjoint,
    Objective,
    Replay,
    clipping,
    curvature,
    reference_logps,
    undo_adamw,
    weighted_gradient,
)
from keepset.model.load import apply_lora  # noqa: E402
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec  # noqa: E402
from keepset.train.preference import PairLoss, train_dpo  # noqa: E402
from keepset.train.rehearsal import rehearse  # noqa: E402
from keepset.train.sft import train_sft  # noqa: E402
from keepset.train.training import Base, Training  # noqa: E402
from tolerance import trained  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = np.array([0, 0, 1])
HARD = {
    "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 1.0,
}  # fmt: skip
EPSILON = 1e-7


def in_float64(model):
    """All of a model, its norms too, whose own code computes in float32."""
    model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            shift = "Gemma" in type(module).__name__
            eps = module.eps if shift else module.variance_epsilon

            def forward(x, weight=module.weight + shift, eps=eps):
                return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

            module.forward = forward


def replay_of(architecture="llama", n=7, double=True, **changes):
    """A replay of a training, in float64 if asked for, and the target's objectives."""
    args = TrainSpec(**{**HARD, **changes})
    training = Training(ModelSpec(device="cpu"), LoraSpec(lora_r=2, lora_alpha=4), args)
    rows = random_rows(n, seed=5)
    sides = [(r,) for r in rows] if args.loss == "sft" else list(zip(rows, random_rows(n, seed=6), strict=True))
    course, model = rehearse(training, sides, tiny_model(architecture), tiny_tokenizer())
    loss = PairLoss.of(args.loss, args.beta) if args.loss != "sft" else None
    pairs = list(zip(random_rows(3, seed=7), random_rows(3, seed=8), strict=True))
    references = [reference_logps(model, p, token_budget=256) for p in (sides if loss else pairs, pairs)]
    if double:
        in_float64(model)
    if loss is None:
        objective = Objective(sides, "tokens")
    else:
        objective = Objective(sides, loss.name, loss.beta, references[0])
    targets = {name: Objective(pairs, name, 0.5, references[1]) for name in ("sft", "dpo", "margin", "mean_margin")}
    return Replay(model, objective, course, token_budget=64), targets


TASK_MEANS = (TASKS[:, None] == np.arange(2)) / np.array([2, 1])


def end_losses(replay, start, targets, weights):
    """Each target's losses of both tasks after the training with these weights."""
    state = start
    for t in range(len(replay.course.batches)):
        state, _ = replay.forward(state, t, weights)
    replay.put(state.theta)
    with torch.no_grad():
        losses = [goal.losses(replay.model, np.arange(3)).numpy() @ TASK_MEANS for goal in targets.values()]
    return np.array(losses)


def differences(replay, start, targets):
    """(n, targets, 2) central differences, a training for each side of each weight."""
    n = len(replay.objective.examples)
    found = []
    for i in range(n):
        moved = EPSILON * (np.arange(n) == i)
        up, down = (end_losses(replay, start, targets, 1 + sign * moved) for sign in (1, -1))
        found.append((up - down) / (2 * EPSILON))
    return np.array(found)


def derivatives(replay, start, goal):
    """(n, 2) by the adjoint."""
    end, taken = replay.run(start, 0, len(replay.course.batches))
    replay.put(end.theta)
    _, gradient = weighted_gradient(replay.model, replay.names, goal, np.arange(3), TASK_MEANS, 64)
    adjoint, slopes = Adjoint.of(gradient), np.zeros((len(replay.objective.examples), 2))
    for t in reversed(range(len(taken))):
        adjoint, step = replay.back(taken[t], t, adjoint)
        slopes[replay.course.batches[t]] += step
    return slopes


CASES = {
    "sft": {},
    "no clipping, no decay, linear": {"max_grad_norm": 0, "weight_decay": 0, "lr_scheduler_type": "linear"},
    "one batch a step, no warm-up": {"gradient_accumulation_steps": 1, "warmup_ratio": 0, "num_train_epochs": 3},
    "a window": {"architecture": "gemma3", "max_grad_norm": 0.05},
    "dpo": {"loss": "dpo"},
    "davir": {"loss": "davir", "max_grad_norm": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_adjoint_is_the_derivative_of_the_whole_training(case):
    replay, targets = replay_of(**CASES[case])
    start = replay.start()
    _, taken = replay.run(start, 0, len(replay.course.batches))
    cut = [clipping(step.gradient, replay.course.max_norm)[0] < 1 for step in taken]
    assert any(cut) == bool(replay.course.max_norm)
    want = differences(replay, start, targets)
    for k, (name, goal) in enumerate(targets.items()):
        got = derivatives(replay, start, goal)
        assert np.linalg.norm(got - want[:, k]) < 1e-4 * np.linalg.norm(want[:, k]), name


def test_in_float32_it_is_the_same_to_a_percent():
    """Adam's ε of 1e-8 is below the rounding of some of DPO's gradients, so it is larger there."""
    for changes in ({}, {"loss": "dpo", "extra": {"adam_epsilon": 1e-7}}):
        exact, targets = replay_of(**changes)
        rough, rough_targets = replay_of(double=False, **changes)
        starts = exact.start(), rough.start()
        for name, goal in targets.items():
            want, got = derivatives(exact, starts[0], goal), derivatives(rough, starts[1], rough_targets[name])
            assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want), name


def test_differentiating_twice_is_nearer_than_central_differences():
    """What decided between the two: ∇²L u at a trained state, u as Adam makes it, against float64."""
    errors = {}
    (exact, targets), (rough, _) = replay_of(), replay_of(double=False)
    products = {}
    for replay in (exact, rough):
        state, taken = replay.run(replay.start(), 0, 3)
        _, gradient = replay.gradient_of(targets["sft"], state, TASK_MEANS[:, :1])
        _, u = undo_adamw(replay.course, taken[-1], 2, Adjoint.of(gradient))
        u = {n: x.to(state.theta[n].dtype) for n, x in u.items()} if replay is exact else products["u"]
        products["u"] = {n: x.float() for n, x in u.items()}
        replay.put(state.theta)
        batch = replay.course.batches[3]
        _, products[replay is exact] = curvature(replay.model, replay.objective, batch, u, 256)
    want = torch.cat([x.flatten() for x in products[True].values()])

    def error(found):
        return float((torch.cat([x.flatten() for x in found]).double() - want).norm() / want.norm())

    twice = error(products[False].values())
    u, batch = products["u"], rough.course.batches[3]
    size, length = (torch.stack([x.norm() for x in v.values()]).norm() for v in (state.theta, u))
    weights = np.full((len(batch), 1), 1 / rough.objective.mass(batch).sum())
    for reach in (1e-1, 1e-2, 1e-3, 1e-4):
        step, sides = reach * size / length, []
        for sign in (1, -1):
            rough.put({n: x + sign * step * u[n][0] for n, x in state.theta.items()})
            _, moved = weighted_gradient(rough.model, rough.names, rough.objective, batch, weights, 256)
            sides.append(moved)
        errors[reach] = error([(sides[0][n] - sides[1][n]) / (2 * step) for n in rough.names])
    assert twice < 1e-4 and min(errors.values()) > 5 * twice, (twice, errors)


@pytest.mark.parametrize("name", ["llama, LongRoPE", "minicpm3", "gemma2"])
def test_second_derivatives_of_models_that_run_in_other_ways(name):
    """Rows that run alone, a head of the model's own code, soft caps: against differences of the first derivative."""
    model_type, changes = architectures.VARIANTS.get(name, (name, {}))
    model = apply_lora(
        architectures.tiny_model(model_type, **changes), LoraSpec(lora_r=2, lora_target_modules=["o_proj"]), 0
    ).eval()
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    rng = np.random.default_rng(5)
    rows = [(architectures.Row(rng.integers(5, 390, n), np.arange(n) > n // 2),) for n in (10, 30, 41)]
    objective, every = Objective(rows, "tokens"), np.arange(3)
    u, start = {}, {}
    for n in names:
        p = model.get_parameter(n)
        p.requires_grad_(True)
        u[n] = torch.from_numpy(rng.normal(size=p.shape)).float()
        start[n] = p.detach() + 0.1 * u[n].flip(0)
    mass = objective.mass(every)

    def gradient(step):
        with torch.no_grad():
            for n in names:
                model.get_parameter(n).copy_(start[n] + step * u[n])
        return weighted_gradient(model, names, objective, every, np.eye(3) / mass.sum(), 64)[1]

    up, down, here = (gradient(step) for step in (2e-3, -2e-3, 0.0))
    slopes, products = curvature(model, objective, every, {n: x[None] for n, x in u.items()}, 64)
    want = torch.cat([((up[n] - down[n]).sum(0) / 4e-3).flatten() for n in names])
    got = torch.cat([products[n].flatten() for n in names])
    assert float((got - want).norm() / want.norm()) < 1e-2
    along = np.array([sum(float((here[n][i] * u[n]).sum()) for n in names) for i in range(3)])
    np.testing.assert_allclose(slopes[:, 0], along, atol=1e-4 * np.abs(along).max())


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_weights_are_the_real_trainers(loss, tmp_path):
    """Some rows left out, a batch of them too, and others counted in part: the trainer ends where the replay does."""
    rows, weights = random_rows(7, seed=5), np.array([1, 0, 0, 0.5, 2, 0, 1.0])
    sides = [(r,) for r in rows] if loss == "sft" else list(zip(rows, random_rows(7, seed=6), strict=True))
    args = TrainSpec(**{**HARD, "per_device_train_batch_size": 1, "loss": loss})
    training = Training(ModelSpec(device="cpu"), LoraSpec(lora_r=2, lora_alpha=4), args)
    base, weighted = Base("", lambda: (tiny_model(), tiny_tokenizer())), replace(training, weights=weights.tolist())
    if loss == "sft":
        train_sft(weighted, rows, tmp_path, base)
    else:
        train_dpo(weighted, sides, tmp_path, PairLoss.of(loss), base=base)
    theirs = load_file(tmp_path / "adapter_model.safetensors")

    course, model = rehearse(training, sides, *base.load())
    assert any(not weights[batch].any() for batch in course.batches) or loss == "dpo"
    reference = None if loss == "sft" else reference_logps(model, sides, token_budget=256)
    replay = Replay(model, Objective(sides, "tokens" if loss == "sft" else loss, 0.1, reference), course)
    start, ends = replay.start(), []
    for w in (weights, np.ones(7)):
        state = start
        for t in range(len(course.batches)):
            state, _ = replay.forward(state, t, w)
        ends.append(state.theta)
    near = trained(HARD["learning_rate"], len(course.batches))
    for n, theta in ends[0].items():
        torch.testing.assert_close(theta, theirs[n.replace(".default", "")], atol=near, rtol=0)
    assert max(float((ends[0][n] - x).abs().max()) for n, x in ends[1].items()) > 10 * near
