"""In-run Shapley steps against plain autograd."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.features.in_run import in_run_step, task_weights  # noqa: E402
from oracles import in_run_shapley  # noqa: E402
from slow_gradients import flat, mean_nll_gradient, token_logps  # noqa: E402
from tolerance import BACKWARD  # noqa: E402

TASKS = np.array([0, 0, 1])


def lora_names(peft):
    return [n for n, _ in peft.named_parameters() if "lora_" in n]


def task_losses(peft, target):
    with torch.no_grad():
        means = np.array([-float(token_logps(peft, r).double().mean()) for r in target])
    return np.array([means[TASKS == t].mean() for t in range(2)])


def hessian_times(peft, names, target, task, u):
    """H u by differentiating twice, with the attention that can."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = [dict(peft.named_parameters())[n] for n in names]
    for p in parameters:
        p.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        loss = torch.stack(
            [-token_logps(peft, r).mean() for r, t in zip(target, TASKS, strict=True) if t == task]
        ).mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        along = sum((g * u[n]).sum() for n, g in zip(names, grads, strict=True))
        return dict(zip(names, torch.autograd.grad(along, parameters), strict=True))


def test_a_steps_values_are_plain_autograds_and_the_step_is_sgd() -> None:
    peft = tiny_lora(tiny_model("llama", attn="sdpa"), r=2)
    batch, target = random_rows(5, seed=1), random_rows(3, seed=2)
    names = lora_names(peft)
    alone = [mean_nll_gradient(peft, names, r) for r in batch]
    mean = {n: torch.stack([g[n] for g in alone]).mean(0) for n in names}
    goals = [mean_nll_gradient(peft, names, r) for r in target]
    v = [flat({n: torch.stack([g[n] for g, t in zip(goals, TASKS, strict=True) if t == k]).mean(0) for n in names})
         for k in range(2)]  # fmt: skip
    hu = [flat(hessian_times(peft, names, target, k, mean)) for k in range(2)]
    rows = np.stack([flat(g) for g in alone]) / 5
    before = {n: p.detach().clone() for n, p in peft.named_parameters() if n in names}
    step = in_run_step(peft, batch, target, task_weights(TASKS, 2), learning_rate=0.05, second_order=True)
    np.testing.assert_allclose(step.dots, rows @ np.stack(v).T, atol=BACKWARD * np.abs(step.dots).max())
    assert step.curvature is not None
    np.testing.assert_allclose(step.curvature, rows @ np.stack(hu).T, atol=5e-3 * np.abs(step.curvature).max())
    for name, p in peft.named_parameters():
        if name in names:
            assert torch.allclose(p, before[name] - 0.05 * mean[name], atol=0.05 * BACKWARD)


def test_the_values_of_a_run_add_up_to_the_drop_of_the_targets_loss() -> None:
    """Efficiency: the run's values sum to the change of the loss, to second order nearer than to first."""
    rows, target = random_rows(12, seed=3), random_rows(3, seed=4)
    errors = {}
    for second in (False, True):
        peft = tiny_lora(tiny_model("llama"), r=2)
        before = task_losses(peft, target)
        total = np.zeros(2)
        for start in range(0, 12, 4):
            step = in_run_step(
                peft, rows[start : start + 4], target, task_weights(TASKS, 2), learning_rate=0.05, second_order=second
            )
            curvature = None if step.curvature is None else step.curvature[None]
            total += in_run_shapley(step.dots[None], np.array([0.05]), np.ones((1, 4), bool), curvature)[1].sum(0)
        errors[second] = np.abs(total - (before - task_losses(peft, target))).max()
    drop = np.abs(before - task_losses(peft, target)).max()
    assert drop > 0.01 and errors[False] < 0.5 * drop
    assert errors[True] < 0.2 * errors[False]
