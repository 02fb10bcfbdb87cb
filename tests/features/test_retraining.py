"""In-run Shapley steps and the retraining utility against plain autograd and torch's own optimiser."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.features.losses import row_losses  # noqa: E402
from keepset.features.retraining import Retraining  # noqa: E402
from keepset.methods.tmc_shapley import tmc_shapley  # noqa: E402
from slow_gradients import token_logps  # noqa: E402
from tolerance import FORWARD, MAPPED  # noqa: E402

TASKS = np.array([0, 0, 1])


def task_losses(peft, target):
    with torch.no_grad():
        means = np.array([-float(token_logps(peft, r).double().mean()) for r in target])
    return np.array([means[TASKS == t].mean() for t in range(2)])


def utility(rows, target, **changes):
    peft = tiny_lora(tiny_model("llama"), r=2)
    options = {"learning_rate": 0.01, "epochs": 1, "batch_size": 2, **changes}
    return peft, Retraining(peft, rows, target, TASKS, **options)


def test_the_utility_is_torchs_adamw_from_the_same_start() -> None:
    rows, target = random_rows(4, seed=5), random_rows(3, seed=6)
    peft, found = utility(rows, target)
    nothing = found(np.zeros(0, np.int64))
    assert nothing == pytest.approx(-task_losses(peft, target).mean(), rel=4 * FORWARD)
    trained = found(np.array([3, 0, 1]))
    assert trained == pytest.approx(-task_losses(peft, target).mean(), rel=4 * FORWARD)
    assert found(np.array([0, 1, 3])) == trained != found(np.array([0, 1, 2]))
    assert found(np.zeros(0, np.int64)) == nothing  # the start is whole

    twin = tiny_lora(tiny_model("llama"), r=2)
    chosen = [p for n, p in twin.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.0)
    order = np.random.default_rng(0).permutation([0, 1, 3])
    for some in (order[:2], order[2:]):
        optimizer.zero_grad()
        torch.stack([-token_logps(twin, rows[i]).mean() for i in some]).mean().backward()
        optimizer.step()
    assert trained == pytest.approx(-task_losses(twin, target).mean(), rel=MAPPED)


def test_shapley_values_of_real_trainings_add_up_and_find_the_row_that_is_the_target() -> None:
    target = random_rows(3, seed=7)
    rows = [*random_rows(3, seed=8), target[2]]
    _, found = utility(rows, target, learning_rate=0.02, epochs=3)
    known: dict[frozenset, float] = {}

    def cached(indices):
        key = frozenset(int(i) for i in indices)
        if key not in known:
            known[key] = found(indices)
        return known[key]

    estimate = tmc_shapley(4, cached, permutations=8)
    assert estimate.values.sum() == pytest.approx(cached(np.arange(4)) - cached(np.zeros(0, int)))
    assert estimate.values.argmax() == 3 and len(known) <= 16
    assert row_losses(found.model, rows, token_budget=99).nll.shape == (1, 4)
