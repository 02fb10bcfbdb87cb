"""Metagradient from a recipe: the derivative of the recipe's own training, resume, memory, price, refusals."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

from keepset.errors import RecipeError
from keepset.features.metagradient import Replay, Taken
from keepset.pipeline.price import full_training_flops, selection_work
from keepset.pipeline.score import score
from keepset.stages import metagradient as stage
from keepset.stages.job import Job
from tiny_recipe import TRAIN, quiet, recipe

HARD = {**TRAIN, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "warmup_ratio": 0.2}


def made(model_folder, data, folder, *options, **more):
    methods = [{"name": "metagradient", "label": f"m{k}", "options": o} for k, o in enumerate(options or ({},))]
    return Job(recipe(model_folder, data, folder, methods=methods, **{"train": HARD, **more}), console=quiet())


def scores_of(job, k=0):
    return score(job, job.recipe.methods[k])["score"].to_numpy()


def test_a_row_left_out_moves_the_loss_as_its_score_says(model_folder, data, tmp_path):
    """Tasks apart average to the mean's scores; each loss has its own."""
    job = made(model_folder, data, tmp_path, {}, {"reduce": "max"}, {"loss": "sft"}, {"loss": "mean_margin"})
    mean, most, sft, margin = (scores_of(job, k) for k in range(4))
    table = job.run.load_table("scores/m1.parquet")
    tasks = np.stack([table[f"task.{t}"].to_numpy() for t in "ab"])
    np.testing.assert_array_equal(most, tasks.max(axis=0))
    np.testing.assert_allclose(tasks.mean(axis=0), mean, atol=0.01 * np.abs(mean).max())
    assert not any(name.startswith("task.") for name in job.run.load_table("scores/m0.parquet").column_names)
    assert np.abs(np.corrcoef([mean, sft, margin])[0, 1:]).max() < 0.999 and np.isfinite(margin).all()
    assert [p.name for p in sorted((tmp_path / "models").glob("metagradient-*/*.safetensors"))] == 4 * [
        "state.safetensors"
    ]
    shuffled = tmp_path / "shuffled.jsonl"
    lines = Path(data["pool"]).read_text().splitlines(keepends=True)
    shuffled.write_text("".join(lines[::-1]))
    other = made(model_folder, data, tmp_path / "other", pool=str(shuffled))
    by_id = dict(zip(other.ids, scores_of(other), strict=True))
    np.testing.assert_array_equal([by_id[i] for i in job.ids], mean)


def dies_after(monkeypatch, name, times):
    """Stop the process, as it were, once a file of that name was written so many times."""
    replace, written = os.replace, []

    def dies(source, path):
        replace(source, path)
        written.append(Path(path).name)
        if written[-1].startswith(name) and sum(one.startswith(name) for one in written) == times:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)


def test_killed_forwards_and_backwards_the_scores_are_the_same(model_folder, data, tmp_path, monkeypatch):
    want = scores_of(made(model_folder, data, tmp_path / "whole"))
    folder = tmp_path / "killed"
    for name, times in (("step-", 2), ("state.safetensors", 1), ("state.safetensors", 4), ("state.safetensors", 4)):
        with monkeypatch.context() as until_killed, pytest.raises(KeyboardInterrupt):
            dies_after(until_killed, name, times)
            scores_of(made(model_folder, data, folder))
    taken: list[int] = []
    forward = Replay.forward
    monkeypatch.setattr(Replay, "forward", lambda self, state, t, *w: taken.append(t) or forward(self, state, t, *w))
    np.testing.assert_array_equal(scores_of(made(model_folder, data, folder)), want)
    assert taken == []  # the last write was the whole result
    (state,) = folder.glob("models/metagradient-*/state.safetensors")
    state.write_bytes(state.read_bytes()[:50])  # a torn result is none
    (folder / "scores/m0.parquet").unlink()
    taken.clear()
    np.testing.assert_array_equal(scores_of(made(model_folder, data, folder)), want)
    assert sorted(set(taken)) == list(range(9))


def test_no_more_than_a_segment_of_steps_is_held(model_folder, data, tmp_path, monkeypatch):
    longer = {"train": {**HARD, "num_train_epochs": 9}}
    want = scores_of(made(model_folder, data, tmp_path / "a", **longer))
    held: list[tuple[int, int]] = []
    back = Replay.back

    def counted(self, taken, *more):
        alive = [one for one in gc.get_objects() if type(one) is Taken]
        files = len(list((tmp_path).glob("b*/models/metagradient-*/step-*.safetensors")))
        held.append((len(alive), files))
        return back(self, taken, *more)

    monkeypatch.setattr(Replay, "back", counted)
    scores_of(made(model_folder, data, tmp_path / "b1", **longer))
    assert len(held) == 27 and max(alive for alive, _ in held) == 6 and {files for _, files in held} == {5}
    held.clear()
    monkeypatch.setattr(stage, "SEGMENT", 2 * 16 * 1792 // 2)  # bytes of two steps of the adapter's 896 numbers
    np.testing.assert_allclose(scores_of(made(model_folder, data, tmp_path / "b2", **longer)), want, rtol=1e-6)
    assert max(alive for alive, _ in held) <= 3


def test_the_price_is_four_trainings_and_the_tasks_apart_more(model_folder, data, tmp_path):
    job = made(model_folder, data, tmp_path, {}, {"reduce": "max"}, {"loss": "sft"})
    training = full_training_flops(job)
    one, apart, sft = ([w for w in selection_work(job, [spec])] for spec in job.recipe.methods)
    goals = sum(w.flops for w in one) - 4 * training
    assert 0 < goals < training and sum(w.trainings for w in one) == 1
    assert sum(w.flops for w in apart) > sum(w.flops for w in one) + 0.99 * training
    assert 4 * training < sum(w.flops for w in sft) < 5 * training


def test_a_training_on_pairs_is_followed_too(model_folder, data, tmp_path):
    pairs = {"pool": [{"path": data["pairs"], "pairs": True}], "train": {**HARD, "loss": "dpo"}}
    scores = scores_of(made(model_folder, data, tmp_path, **pairs))
    assert np.isfinite(scores).all() and len(np.unique(scores)) == len(scores) == 6


def test_what_can_t_be_done_is_said(model_folder, data, tmp_path):
    rows = {"target": data["rows"]}
    with pytest.raises(RecipeError, match="loss: dpo needs pairs.*loss: sft"):
        scores_of(made(model_folder, data, tmp_path / "a", **rows))
    assert np.isfinite(scores_of(made(model_folder, data, tmp_path / "b", {"loss": "sft"}, **rows))).all()
    with pytest.raises(RecipeError, match="lora_dropout: 0"):
        scores_of(made(model_folder, data, tmp_path / "c", lora={"lora_dropout": 0.1}))
