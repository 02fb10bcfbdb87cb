"""One training over several processes: the steps, the batch and the loss of one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import random_rows, save_tiny
from keepset.errors import RecipeError
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.fit import fit
from keepset.train.launch import read_rows, write_job
from keepset.train.training import Training
from tolerance import trained

LORA = LoraSpec(lora_r=2, lora_alpha=4)


def args(**more):
    return TrainSpec(num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, **more)


def test_rows_come_back_as_they_were_written(tmp_path):
    from safetensors.numpy import load_file as load

    a, b, c, d = random_rows(4)
    for sides in ([(a,), (b,), (c,)], [(a, b), (c, d)]):
        write_job(Training(ModelSpec(), LORA, args()), sides, tmp_path)
        back = read_rows(load(tmp_path / "rows.safetensors"))
        assert [len(row) for row in back] == [len(row) for row in sides]
        for one, other in zip((s for r in sides for s in r), (s for r in back for s in r), strict=True):
            assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.supervised, other.supervised)


def test_one_process_is_the_old_key_and_more_are_another():
    assert "num_processes" not in args().key() and args(num_processes=2).key()["num_processes"] == 2


def test_a_batch_that_is_not_shared_evenly_is_refused(tmp_path, monkeypatch):
    save_tiny(tmp_path / "base")
    monkeypatch.setenv("KEEPSET_LAUNCHED", "1")
    spec, rows = ModelSpec(model_name_or_path=str(tmp_path / "base"), device="cpu"), [(r,) for r in random_rows(8)]
    with pytest.raises(RecipeError, match="3 don't share a batch of 4 evenly"):
        fit(spec, LORA, rows, tmp_path / "out", args(num_processes=3), seed=0)
    with pytest.raises(RecipeError, match="num_processes: 2, and 1 were started"):
        fit(spec, LORA, rows, tmp_path / "out", args(num_processes=2), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_two_processes_take_the_steps_of_one(tmp_path, loss):
    save_tiny(tmp_path / "base", max_position_embeddings=512)
    spec = ModelSpec(model_name_or_path=str(tmp_path / "base"), device="cpu")
    rows = random_rows(16)
    sides = [(r,) for r in rows[:8]] if loss == "sft" else list(zip(rows[:8], rows[8:], strict=True))
    one = fit(spec, LORA, sides, tmp_path / "one", args(loss=loss), seed=0, moments=True)
    two = fit(spec, LORA, sides, tmp_path / "two", args(loss=loss, num_processes=2), seed=0, moments=True)
    assert one.steps == two.steps == 4 and one.tokens == two.tokens
    # SFT logs the loss over all supervised tokens of the step; DPO's is the mean over pairs of the processes' means
    assert np.allclose(one.losses, two.losses, atol=1e-4)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("adapter_model.safetensors"))
    assert len(files) == 3  # each epoch's checkpoint too
    for file in files:
        a, b = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=trained(1e-2, 4)) for k in a)
    assert not list((tmp_path / "two").glob("trainer*"))
    assert json.loads((tmp_path / "two/training.json").read_text())["steps"] == 4
