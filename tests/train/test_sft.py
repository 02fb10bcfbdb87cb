"""SFT: the packed step against TRL's own, determinism, exact resume, arguments, Adam moments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import random_rows, save_tiny, tiny_model, tiny_tokenizer
from keepset.errors import DataError, ModelError, RecipeError
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train import sft
from keepset.train.training import Base, Training
from tolerance import BACKWARD, FORWARD, trained

LORA = LoraSpec(lora_r=2, lora_alpha=4)
CPU = ModelSpec(device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**changes):
    return TrainSpec(**{"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **changes})


def fit(out, rows=None, *, seed=0, lora=LORA, architecture="llama", resume=True, moments=False, **changes):
    training = Training(CPU, lora, spec(**changes), seed, moments, resume)
    base = Base("", lambda: (tiny_model(architecture), tiny_tokenizer()))
    return sft.train_sft(training, random_rows(10) if rows is None else rows, out, base)


def weights(out):
    return load_file(out / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_result_and_determinism(tmp_path):
    rows = random_rows(10)
    result = fit(tmp_path / "a", rows)
    assert result.steps == 6 and len(result.losses) == 6 and np.isfinite(result.losses).all()
    assert result.tokens == 2 * sum(len(r.input_ids) for r in rows)
    assert result.supervised_tokens == 2 * sum(int(r.supervised.sum()) for r in rows)
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["losses"] == result.losses and record["steps"] == 6 and len(record["learning_rates"]) == 6
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.name != "README.md") == [
        "adapter_config.json", "adapter_model.safetensors", "training.json",
    ]  # fmt: skip
    fit(tmp_path / "b", rows)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    fit(tmp_path / "c", rows, seed=1)
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(("architecture", "accumulate"), [("llama", 1), ("llama", 2), ("gemma3", 1)])
def test_packed_step_equals_trl(tmp_path, monkeypatch, architecture, accumulate):
    """Same data, same seed: our parts of at most 20 tokens and TRL's padded step with its own head."""
    rows = random_rows(10, longest=12)
    monkeypatch.setattr("keepset.train.packed.PackedCollator.micro_tokens", 20, raising=False)
    monkeypatch.setattr("keepset.train.packed.MICRO_TOKENS", 20)
    ours = fit(tmp_path / "ours", rows, architecture=architecture, gradient_accumulation_steps=accumulate)
    # An option that our step doesn't serve and that changes nothing here sends it down TRL's path.
    theirs = fit(
        tmp_path / "trl", rows, architecture=architecture, gradient_accumulation_steps=accumulate,
        extra={"label_smoothing_factor": 1e-12},
    )  # fmt: skip
    assert ours.losses == pytest.approx(theirs.losses, rel=BACKWARD)
    a, b = weights(tmp_path / "ours"), weights(tmp_path / "trl")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=trained(1e-2, ours.steps)), name


def test_a_model_with_attention_dropout_and_other_module_names(tmp_path):
    rows = random_rows(8)
    result = fit(tmp_path / "gpt2", rows, architecture="gpt2", num_train_epochs=4)
    assert result.losses[-1] < result.losses[0]
    assert all("c_attn" in name or "c_proj" in name for name in weights(tmp_path / "gpt2"))


def test_first_loss_is_the_token_mean(tmp_path):
    rows = random_rows(4)
    model = tiny_model().eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total -= logp[torch.from_numpy(row.supervised[1:])].sum().item()
        count += int(row.supervised.sum())
    result = fit(tmp_path / "out", rows, num_train_epochs=1)
    assert result.losses[0] == pytest.approx(total / count, rel=4 * FORWARD)


class Stop(TrainerCallback):
    """Ends the first training at its third epoch."""

    stopped = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch >= 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


class Never(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        pytest.fail("trained again")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_exact(tmp_path, watch_trainers, dropout):
    lora = LORA.model_copy(update={"lora_dropout": dropout})
    whole = fit(tmp_path / "whole", num_train_epochs=4, lora=lora)
    watch_trainers(Stop())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", num_train_epochs=4, lora=lora)
    assert not (tmp_path / "cut" / "training.json").exists()
    # A checkpoint that was being written when the power went counts for nothing.
    torn = tmp_path / "cut" / "trainer" / "checkpoint-11"
    torn.mkdir()
    rest = fit(tmp_path / "cut", num_train_epochs=4, lora=lora)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert rest.losses == whole.losses and rest.steps == whole.steps and rest.tokens == whole.tokens


def test_finished_is_reused_and_other_plan_is_not(tmp_path, watch_trainers, monkeypatch):
    first = fit(tmp_path / "out")
    watch_trainers(Never())
    assert fit(tmp_path / "out").losses == first.losses
    monkeypatch.undo()
    other = fit(tmp_path / "out", num_train_epochs=1)
    assert other.steps == 3


def test_what_a_kill_after_the_last_write_left_is_removed(tmp_path):
    fit(tmp_path / "a")
    (tmp_path / "a/trainer/checkpoint-3").mkdir(parents=True)
    (tmp_path / "a/trainer/checkpoint-3/adapter_model.safetensors").write_bytes(b"left behind")
    fit(tmp_path / "a")
    assert not (tmp_path / "a/trainer").exists()


def test_checkpoint_of_another_plan_is_dropped(tmp_path, watch_trainers, caplog):
    watch_trainers(Stop())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", num_train_epochs=4)
    fit(tmp_path / "out", num_train_epochs=3)
    assert "dropped" in caplog.text
    fit(tmp_path / "fresh", num_train_epochs=3)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "fresh"))


def test_full_fine_tuning_saves_a_whole_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fit(tmp_path / "out", full=True, num_train_epochs=1)
    before, after = tiny_model(), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template


def test_arguments(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'adam_beta1'"):
        fit(tmp_path, extra={"adam_beta_1": 0.8})
    with pytest.raises(RecipeError, match="beside `extra`"):
        fit(tmp_path, extra={"learning_rate": 1})
    with pytest.raises(RecipeError, match="sets this itself"):
        fit(tmp_path, extra={"max_length": 5})
    with pytest.raises(RecipeError, match="warmup_ratio"):
        fit(tmp_path, warmup_ratio=1.0)
    with pytest.raises(ModelError, match="the model has no 'up_prj'; its linear modules are: .*up_proj"):
        fit(tmp_path, lora=LoraSpec(lora_target_modules=["up_prj"]))
    assert fit(tmp_path / "steps", extra={"max_steps": 2, "adam_beta1": 0.5}).steps == 2


def test_a_tracker_is_told_every_step(tmp_path, monkeypatch):
    """`extra.report_to` reaches the trainer; the tracker itself is a stand-in, none is installed here."""
    from transformers.integrations import integration_utils

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **more):
            seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    monkeypatch.setattr("keepset.train.arguments.find_spec", lambda name: True if name == "trackio" else None)
    result = fit(tmp_path / "a", extra={"report_to": "trackio"})
    assert [logs["loss"] for logs in seen if "loss" in logs] == pytest.approx(result.losses, abs=1e-3)
    with pytest.raises(RecipeError, match="extra.report_to: wandb is not installed: pip install wandb"):
        fit(tmp_path / "b", extra={"report_to": ["trackio", "wandb"]})


def test_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.SFTTrainer, "_send_telemetry", lambda trainer: pytest.fail("sent"))
    fit(tmp_path / "ours", num_train_epochs=1)
    fit(tmp_path / "trl", num_train_epochs=1, extra={"label_smoothing_factor": 1e-12})


def test_bad_rows_and_a_loss_that_explodes(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        fit(tmp_path, [])
    rows = random_rows(3)
    rows[1].supervised[:] = False
    with pytest.raises(DataError, match="row 1"):
        fit(tmp_path, rows)
    with pytest.raises(DataError, match="NaN or infinite at step"):
        fit(tmp_path / "nan", learning_rate=1e30, max_grad_norm=0, warmup_ratio=0, num_train_epochs=3, full=True)
    assert not (tmp_path / "nan" / "training.json").exists()


def test_from_a_model_folder_and_back(tmp_path):
    """`train_sft` loads the base itself; its result is an adapter that `keepset.model.load.load` puts on."""
    from keepset.model.load import load

    base = ModelSpec(model_name_or_path=str(tmp_path / "base"), device="cpu")
    save_tiny(tmp_path / "base")
    rows = [
        load(base).encoder.encode([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}])
    ]
    result = sft.train_sft(Training(base, LORA, spec(num_train_epochs=5)), rows * 4, tmp_path / "out")
    assert result.losses[-1] < result.losses[0]
    trained = load(base, adapter=tmp_path / "out")
    assert trained.model.peft_config["default"].r == 2


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_other_weights_in_the_same_folder_are_trained_anew(kind, tmp_path):
    """The folder's name alone once told a finished training: the old base's adapter was taken for the new one's."""
    from keepset.train.fit import fit as fit_by
    from keepset.train.reward import train_reward

    base = ModelSpec(model_name_or_path=str(tmp_path / "base"), device="cpu")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = random_rows(6, seed=3)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    args = spec(num_train_epochs=2, warmup_ratio=0, loss="sft" if kind == "reward" else kind)

    def train(out):
        if kind == "reward":
            train_reward(Training(base, LORA, args), pairs, tmp_path / out)
        else:
            fit_by(base, LORA, pairs, tmp_path / out, args, seed=0)
        return weights(tmp_path / out)

    tiny_model().save_pretrained(tmp_path / "base")
    first = train("out")
    assert same(first, train("out"))
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    second = train("out")
    assert not same(first, second) and same(second, train("fresh"))


TWO = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import torch
from conftest import random_rows, tiny_model, tiny_tokenizer, save_tiny
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.sft import train_sft
from keepset.train.training import Base, Training

torch.set_num_threads(1)
args = TrainSpec(num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-2)
train_sft(Training(ModelSpec(device="cpu"), LoraSpec(lora_r=2, lora_alpha=4), args), random_rows(8), Path({out!r}),
          Base("", lambda: (tiny_model(), tiny_tokenizer())))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Under torchrun (gloo) TRL's own padded step runs; the batch of 4 is split over two processes."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path / "two")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, timeout=250, capture_output=True)
    fit(tmp_path / "one", random_rows(8))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=trained(1e-2, 4)) for k in one)


def test_a_training_that_changed_nothing_is_told(tmp_path, caplog):
    fit(tmp_path / "one", random_rows(3), num_train_epochs=1)  # one step, and the warm-up's first has the rate 0
    assert "the adapter still does nothing" in caplog.text and "warmup_ratio" in caplog.text
    caplog.clear()
    fit(tmp_path / "two", random_rows(3), num_train_epochs=1, warmup_ratio=0)
    assert "does nothing" not in caplog.text
