"""The replayed training is the trainer's: its states equal the checkpoints of a real SFT and DPO training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import random_rows, tiny_model, tiny_tokenizer
from keepset.errors import RecipeError
from keepset.features.adam import load_adam
from keepset.features.metagradient import Objective, Replay, clipping, reference_logps
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.preference import PairLoss, train_dpo
from keepset.train.rehearsal import rehearse
from keepset.train.sft import train_sft
from keepset.train.training import Base, Training
from keepset.train.warmup import list_checkpoints
from tolerance import BACKWARD, trained

pytestmark = pytest.mark.usefixtures("one_thread")

HARD = {
    "num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "extra": {"adam_beta2": 0.99, "adam_epsilon": 1e-6},
}  # fmt: skip
CASES = {
    "plain": ({}, "llama"),
    "everything": (HARD, "llama"),
    "no clipping, an uneven end": ({"max_grad_norm": 0, "num_train_epochs": 1.4, "warmup_ratio": 0}, "llama"),
    "a window": ({**HARD, "max_grad_norm": 0.01}, "gemma3"),
    "dpo": ({"loss": "dpo", **HARD}, "llama"),
    "simpo": ({"loss": "simpo"}, "llama"),
}


def training(**changes):
    args = TrainSpec(**{"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **changes})
    return Training(ModelSpec(device="cpu"), LoraSpec(lora_r=2, lora_alpha=4), args, moments=True)


def sides_of(loss):
    rows = random_rows(11, seed=5)
    return [(row,) for row in rows] if loss == "sft" else list(zip(rows, random_rows(11, seed=6), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_replayed_states_are_the_trainers_checkpoints(case, tmp_path):
    changes, architecture = CASES[case]
    made = training(**changes)
    sides, base = sides_of(made.args.loss), Base("", lambda: (tiny_model(architecture), tiny_tokenizer()))
    if made.args.loss == "sft":
        train_sft(made, [row for (row,) in sides], tmp_path / "out", base)
    else:
        train_dpo(made, sides, tmp_path / "out", PairLoss.of(made.args.loss), base=base)

    course, model = rehearse(made, sides, *base.load())
    loss = "tokens" if made.args.loss == "sft" else made.args.loss
    reference = None if loss == "tokens" else reference_logps(model, sides, token_budget=256)
    objective = Objective(sides, loss, PairLoss.of(made.args.loss).beta if reference is not None else 0.1, reference)
    replay = Replay(model, objective, course, token_budget=256)
    start = state = replay.start()
    clipped = done = 0
    for checkpoint in list_checkpoints(tmp_path / "out"):
        state, taken = replay.run(state, done, checkpoint.step)
        done = checkpoint.step
        clipped += sum(clipping(step.gradient, course.max_norm)[0] < 1 for step in taken)
        adapter = load_file(checkpoint.path / "adapter_model.safetensors")
        moments = load_adam(checkpoint.path)
        near = trained(made.args.learning_rate, done)
        for name, theta in state.theta.items():
            theirs = adapter[name.replace(".default", "")]
            torch.testing.assert_close(theta, theirs, atol=near, rtol=0)
            for ours, saved in ((state.m, moments.exp_avg), (state.v, moments.exp_avg_sq)):
                size = float(saved[name].abs().max())
                torch.testing.assert_close(ours[name], saved[name], atol=100 * BACKWARD * size, rtol=0)
    assert done == len(course.batches) and sorted(set(np.concatenate(course.batches))) == list(range(11))
    assert clipped >= 3 if "max_grad_norm" in changes and course.max_norm else course.max_norm in (0, 1)
    moved = max(float((x - start.theta[n]).abs().max()) for n, x in state.theta.items())
    assert moved > 10 * near


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"full": True}, "train.full"),
        ({"extra": {"optim": "sgd"}}, "AdamW"),
        ({"extra": {"bf16": True}}, "own training step"),
        ({"extra": {"neftune_noise_alpha": 5}}, "own training step"),
        ({"loss": "dpo", "extra": {"label_smoothing": 0.1}}, "own training step"),
        ({"loss": "ipo", "extra": {"f_divergence_type": "js_divergence"}}, "own training step"),
    ],
)
def test_trainings_that_are_not_followed(change, words):
    made = training(**change)
    with pytest.raises(RecipeError, match=words):
        rehearse(made, sides_of(made.args.loss), tiny_model(), tiny_tokenizer())


def test_dropout_is_refused():
    rows = sides_of("sft")
    with pytest.raises(RecipeError, match="dropout"):
        rehearse(training(), rows, tiny_model("gpt2"), tiny_tokenizer())
    made = Training(ModelSpec(device="cpu"), LoraSpec(lora_dropout=0.1), TrainSpec())
    with pytest.raises(RecipeError, match="dropout"):
        rehearse(made, rows, tiny_model(), tiny_tokenizer())


def test_a_rehearsal_is_told_to_nobody():
    rows, told = sides_of("sft"), training(extra={"report_to": "tensorboard", "save_strategy": "steps"})
    course, _ = rehearse(told, rows, tiny_model(), tiny_tokenizer())
    plain, _ = rehearse(training(), rows, tiny_model(), tiny_tokenizer())
    assert [b.tolist() for b in course.batches] == [b.tolist() for b in plain.batches]
    assert told.args.extra["report_to"] == "tensorboard"
