"""Masked rows: order, steps and the other rows' parts of the loss are those of the training on all rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from conftest import random_rows, tiny_model, tiny_tokenizer
from keepset.errors import RecipeError
from keepset.model.load import lora_config
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train import packed
from keepset.train.preference import PairCollator, PairLoss, train_dpo
from keepset.train.sft import train_sft
from keepset.train.training import Base, Training
from tolerance import BACKWARD

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoraSpec(lora_r=2, lora_alpha=4)
ROWS = random_rows(10)
SPEC = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_ratio": 0.0}
KEPT = np.array([1, 0, 1, 1, 0, 0, 1, 0, 0, 0], dtype=float)  # of five batches of two, some have no row left


def base():
    return Base("", lambda: (tiny_model(), tiny_tokenizer()))


def trained(out, weights, rows=ROWS, **changes):
    training = Training(ModelSpec(device="cpu"), LORA, TrainSpec(**{**SPEC, **changes}), 0, weights=weights)
    if training.args.loss == "sft":
        result = train_sft(training, rows, out, base())
    else:
        result = train_dpo(training, rows, out, PairLoss.of(training.args.loss), base=base())
    return load_file(out / "adapter_model.safetensors"), result


@pytest.fixture
def batches(monkeypatch):
    """The examples of every batch, in the order in which the trainers meet them."""
    met = []
    for kind in (packed.PackedCollator, PairCollator):

        def watched(self, examples, call=kind.__call__):
            met.append([e.get("input_ids") or e["chosen_ids"] for e in examples])
            return call(self, examples)

        monkeypatch.setattr(kind, "__call__", watched)
    return met


def test_order_and_steps_are_those_of_all_rows(tmp_path, batches):
    _, whole = trained(tmp_path / "whole", None)
    order = list(batches)
    batches.clear()
    _, masked = trained(tmp_path / "masked", KEPT)
    assert batches == order and masked.steps == whole.steps == 10
    assert masked.tokens == 2 * sum(len(r.input_ids) for r, k in zip(ROWS, KEPT, strict=True) if k) + lost(order)


def lost(order):
    """Tokens of the rows that stand for batches of which no row is left."""
    place = {tuple(r.input_ids.tolist()): i for i, r in enumerate(ROWS)}
    return sum(len(batch[0]) for batch in order if not any(KEPT[place[tuple(ids)]] for ids in batch))


def test_weights_of_one_change_nothing(tmp_path):
    plain, _ = trained(tmp_path / "plain", None)
    ones, _ = trained(tmp_path / "ones", np.ones(10))
    for name in plain:
        torch.testing.assert_close(ones[name], plain[name], rtol=BACKWARD, atol=1e-7)


@pytest.mark.parametrize("weights", [KEPT, np.linspace(0, 1.5, 10)], ids=["mask", "weights"])
def test_a_masked_training_is_a_plain_loop_with_weights(tmp_path, batches, weights):
    """The adapter starts where the trainer's does, so the loop's start is taken from a training at rate 0."""
    from peft import get_peft_model

    start, _ = trained(tmp_path / "start", None, learning_rate=0.0)
    batches.clear()
    made, _ = trained(tmp_path / "made", weights)
    model = get_peft_model(tiny_model(), lora_config(LORA, tiny_model()))
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(start[name])
    place = {tuple(r.input_ids.tolist()): i for i, r in enumerate(ROWS)}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / len(batches))
        loss, count = torch.zeros(()), 0
        for ids in batch:
            i = place[tuple(ids)]
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            labels = torch.tensor(np.where(ROWS[i].supervised, ROWS[i].input_ids, -100).astype(np.int64))
            loss = loss + weights[i] * cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int(ROWS[i].supervised.sum())
        optimizer.zero_grad(set_to_none=False)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), 1.0)
        optimizer.step()
    for name in made:
        torch.testing.assert_close(made[name], own[name].detach(), rtol=2e-3, atol=2e-5)


def test_weight_two_doubles_a_rows_part_and_zero_removes_it(tmp_path, batches):
    """One step of plain SGD moves B by the batch's mean gradient: that of one row alone is added once, twice, never."""
    plain = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "extra": {"optim": "sgd"}}
    made = {}
    for name, weights in {"zero": [0.0, 1, 1, 1], "one": None, "two": [2.0, 1, 1, 1], "alone": [1.0, 0, 0, 0]}.items():
        made[name], result = trained(tmp_path / name, weights, ROWS[:4], **plain)
        made[name]["loss"] = torch.tensor(result.losses)
    assert all(batch == batches[0] for batch in batches)
    for name, alone in made["alone"].items():
        if "lora_B" in name or name == "loss":
            assert alone.abs().max() > 0
            torch.testing.assert_close(made["one"][name] - made["zero"][name], alone, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(made["two"][name] - made["zero"][name], 2 * alone, rtol=1e-3, atol=1e-7)


def test_pairs_of_weight_zero_leave_the_others_their_part(tmp_path, batches):
    """One step of plain SGD at the base moves B by the mean over ALL pairs of the kept pairs' gradients."""
    pairs = list(zip(random_rows(4, seed=1), random_rows(4, seed=2), strict=True))
    plain = {"loss": "dpo", "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
             "extra": {"optim": "sgd"}}  # fmt: skip
    each = [trained(tmp_path / f"{i}", np.eye(4)[i], pairs, **plain)[0] for i in range(4)]
    two, _ = trained(tmp_path / "two", np.array([1.0, 0, 1, 0]), pairs, **plain)
    assert all(batch == batches[0] for batch in batches)
    for name in two:
        if "lora_B" in name:
            assert two[name].abs().max() > 0
            torch.testing.assert_close(two[name], each[0][name] + each[2][name], rtol=1e-3, atol=1e-7)


def test_weights_are_refused_where_trl_steps(tmp_path):
    with pytest.raises(RecipeError, match="keepset's own training step only"):
        trained(tmp_path, KEPT, extra={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="3 weights for 10 rows"):
        trained(tmp_path, np.ones(3))


def test_a_mask_belongs_to_the_plan(tmp_path):
    """Another mask is another training; the same one is returned as it is."""
    _, first = trained(tmp_path, KEPT)
    assert trained(tmp_path, KEPT)[1].seconds == first.seconds
    plans = [Training(ModelSpec(device="cpu"), LORA, TrainSpec(), weights=w).plan(ROWS, "") for w in (None, KEPT)]
    assert plans[0] != plans[1]
