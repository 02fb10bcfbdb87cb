"""The warm-up: which rows, which checkpoints, whose moments, which learning rates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import random_rows, tiny_model, tiny_tokenizer
from keepset.errors import ModelError
from keepset.features.adam import load_adam
from keepset.recipe import LoraSpec, ModelSpec, WarmupSpec
from keepset.train import sft
from keepset.train.training import Base, Training
from keepset.train.warmup import list_checkpoints, pick_subset

# The checkpoint weights that LESS's scripts publish (princeton-nlp/LESS @ 8abf962), from 422 steps.
LESS = [1.6877e-05, 1.2859e-05, 7.7030e-06, 2.5616e-06]


pytestmark = pytest.mark.usefixtures("one_thread")


def fit(out, **changes):
    args = WarmupSpec(**{"per_device_train_batch_size": 4, "learning_rate": 1e-2, **changes})
    training = Training(ModelSpec(device="cpu"), LoraSpec(lora_r=2), args, moments=True)
    return sft.train_sft(training, random_rows(10), out, Base("", lambda: (tiny_model(), tiny_tokenizer())))


def linear_schedule_means(learning_rate: float, steps: int, warmup_ratio: float, epoch_ends: list[int]) -> list[float]:
    """Mean logged learning rate of each epoch, which ends after these steps, under linear warm-up and decay.

    With w = ⌈ratio · steps⌉, rate after step s = peak · s/w for s < w, else peak · (steps − s)/(steps − w).
    """
    w = int(np.ceil(warmup_ratio * steps))
    s = np.arange(1, steps + 1)
    rates = learning_rate * np.where(s < w, s / max(w, 1), (steps - s) / max(steps - w, 1))
    bounds = [0, *epoch_ends]
    return [float(rates[a:b].mean()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_subset_depends_on_seed_and_not_on_order():
    ids = np.array([f"{i:04d}" for i in np.random.default_rng(0).permutation(200)], dtype=object)
    picked = pick_subset(ids, 0.05, 0)
    assert len(picked) == 10 == len(set(picked))
    shuffled = np.random.default_rng(1).permutation(200)
    assert ids[shuffled][pick_subset(ids[shuffled], 0.05, 0)].tolist() == ids[picked].tolist()
    overlaps = [len(set(ids[picked]) & set(ids[pick_subset(ids, 0.05, s)])) for s in range(1, 20)]
    assert max(overlaps) < 6
    # Every row has its turn.
    seen = {i for s in range(300) for i in pick_subset(ids, 0.05, s)}
    assert len(seen) == 200
    assert len(pick_subset(ids, 0.001, 0, min_rows=8)) == 8 and len(pick_subset(ids[:3], 0.5, 0, min_rows=8)) == 3
    assert len(pick_subset(ids, 0.29, 0)) == 58  # 0.29 * 200 is 57.99999999999999


def test_published_mean_learning_rates():
    got = linear_schedule_means(2e-5, 422, 0.03, [105, 211, 317, 420])
    assert got[:3] == pytest.approx(LESS[:3], rel=0.0021) and got[3] == pytest.approx(LESS[3], rel=0.012)
    shares = np.array(got) / sum(got)
    assert shares == pytest.approx([0.4219, 0.3215, 0.1926, 0.0640], abs=1e-3)


def test_checkpoints_hold_their_epochs_mean_rate(tmp_path):
    result = fit(tmp_path / "w", warmup_ratio=0.2)
    found = list_checkpoints(tmp_path / "w")
    assert [c.step for c in found] == [3, 6, 9, 12] and result.steps == 12
    assert [c.mean_lr for c in found] == pytest.approx(linear_schedule_means(1e-2, 12, 0.2, [3, 6, 9, 12]))
    for c in found:
        names = {p.name for p in c.path.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "adam.safetensors", "meta.json"} <= names
        assert not any(p.suffix in (".pt", ".pth", ".bin") for p in c.path.iterdir())
        assert json.loads((c.path / "meta.json").read_text())["step"] == c.step
    assert not (tmp_path / "w" / "trainer").exists()
    last, final = (
        load_file(found[-1].path / "adapter_model.safetensors"),
        load_file(tmp_path / "w" / "adapter_model.safetensors"),
    )
    assert all(torch.equal(last[k], final[k]) for k in last)


class Keep(TrainerCallback):
    """Copies the live optimiser's moments at each save, by the trainer's own parameter order."""

    def __init__(self):
        self.kept = {}

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = optimizer.optimizer
        named = {n: inner.state[p] for n, p in model.named_parameters() if p.requires_grad}
        self.kept[state.global_step] = {
            n: (s["exp_avg"].clone(), s["exp_avg_sq"].clone(), int(s["step"])) for n, s in named.items()
        }


def test_saved_moments_are_the_optimisers(tmp_path, watch_trainers):
    keep = Keep()
    watch_trainers(keep)
    fit(tmp_path / "w", extra={"adam_beta2": 0.99, "adam_epsilon": 1e-7})
    for checkpoint in list_checkpoints(tmp_path / "w"):
        state = load_adam(checkpoint.path)
        kept = keep.kept[checkpoint.step]
        assert state.exp_avg.keys() == kept.keys() and len(kept) == 2 * 2 * 4
        assert all(name.startswith("base_model.model.model.layers.") for name in kept)
        for name, (first, second, step) in kept.items():
            assert torch.equal(state.exp_avg[name], first) and torch.equal(state.exp_avg_sq[name], second)
            assert state.step == step == checkpoint.step
        assert state.betas == (0.9, 0.99) and state.eps == 1e-7
        assert any(v.abs().max() > 0 for v in state.exp_avg.values())


def test_an_optimiser_without_moments_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Adam"):
        fit(tmp_path / "w", extra={"optim": "sgd"})


def test_no_checkpoints_there(tmp_path):
    with pytest.raises(ModelError, match="no warm-up checkpoint"):
        list_checkpoints(tmp_path)
