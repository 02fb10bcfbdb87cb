"""SIGKILL at 44 named points over all stages and at 20 random times: resumed, every byte that matters is the same.

The points are taken in four rounds. In each round one run folder is killed at every fourth point in turn, each time by
a session that went on where the killed one stopped, and then finished. So neighbouring points, whose damage a later
kill might cover, are never in one round. The default suite takes one round and 2 random times, `make test-slow` all;
`tests/soak.py` takes every point of a run on its own.
"""

from __future__ import annotations

import random
import signal

import pytest

TORN = "half of "  # the file was cut in two before: what a power cut leaves
POINTS = {
    "ingest": [TORN + "sync recipe.yaml.part", "rename quarantine.jsonl"],
    "warm-up": [
        "step 1 models/warmup",
        "save models/warmup/trainer/checkpoint-2/optimizer.pt",
        "rename models/warmup/trainer/checkpoint-2/meta.json",
        "step 3 models/warmup",
        TORN + "sync models/warmup/trainer/checkpoint-4/meta.json.part",
        "rename models/warmup/adapter_model.safetensors",
        "rename models/warmup/checkpoint-4",
        "rename models/warmup/training.json",
        "rename models/warmup/done.json",
    ],
    "gradients": [
        "rename work/influence-*-checkpoint-2/*/key.json",
        TORN + "sync work/influence-*-checkpoint-2/*/00000.safetensors.part",
        "open work/influence-*-checkpoint-2/*/00000.json.part",
        "rename work/influence-*-checkpoint-2/*/00001.json",
        TORN + "sync work/influence-*-checkpoint-4/*/00001.json.part",
    ],
    "scores": ["rename work/records/scores/rose.parquet.json", TORN + "sync scores/rose.parquet.part"],
    "subsets": [TORN + "sync subsets/rose.jsonl.part", "rename subsets.json", "rename findings.json"],
    "reference": [
        "step 2 models/reference",
        "open models/reference/trainer/checkpoint-5/trainer_state.json",
        "step 7 models/reference",
        "rename models/reference/adapter_config.json",
        "open work/records/models/reference/done.json.json.part",
    ],
    "losses": [
        TORN + "sync work/losses-base/*/00000.safetensors.part",
        "open work/losses-reference/*/00000.safetensors.part",
        "rename work/losses-base/*/00001.safetensors",
        "rename work/losses-reference/*/00001.json",
    ],
    "selection": ["rename scores/davir.parquet", "rename subsets/davir.jsonl", "open scores/random-0.parquet.part"],
    "base": ["rename evaluation/base/summary.json"],
    "final training": [
        "step 1 models/rose-seed0",
        "open models/rose-seed0/trainer/checkpoint-1/adapter_config.json",
        TORN + "sync evaluation/rose-seed0/done.json.part",
        "rename models/davir-seed0/training.json",
        "rename work/records/evaluation/davir-seed0/done.json.json",
        "rename models/random-0-seed0/done.json",
    ],
    "comparison": [
        TORN + "sync comparison.json.part",
        "rename data/train-00000-of-00001.parquet",
        "rename README.md",
        "rename manifest.json",
    ],
}
NAMES = [name for names in POINTS.values() for name in names]
ROUNDS = 4


def test_there_are_forty_points():
    assert len(set(NAMES)) == len(NAMES) >= 40


@pytest.mark.parametrize("number", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, ROUNDS))])
def test_killed_at_named_points_and_resumed(tiny_run, tmp_path, number):
    for name in NAMES[number::ROUNDS]:
        done = tiny_run.server.run(
            tiny_run.recipe, tmp_path / "run", kill=name.removeprefix(TORN), torn=name.startswith(TORN)
        )
        assert done["signal"] == signal.SIGKILL, f"'{name}' was not reached:\n{done['log'][-2000:]}"
    assert tiny_run.resumed(tmp_path / "run") == []


@pytest.mark.parametrize("least", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_times_and_resumed(tiny_run, tmp_path, least):
    draw, kills = random.Random(least), 0
    for folder in (tmp_path / f"run{k}" for k in range(40)):
        for _ in range(10):
            done = tiny_run.server.run(tiny_run.recipe, folder, after=draw.uniform(0.1, 2.0))
            if done["exit"] is not None:
                assert done["exit"] == 0, done["log"]
                break
            kills += 1
        assert tiny_run.resumed(folder) == []
        if kills >= least:
            break
    assert kills >= least


def test_resuming_a_finished_run_computes_nothing(tiny_run, tmp_path):
    import shutil

    shutil.copytree(tiny_run.run_dir, tmp_path / "run")
    before = (tmp_path / "run/costs.jsonl").read_bytes()
    assert tiny_run.resumed(tmp_path / "run") == []
    assert (tmp_path / "run/costs.jsonl").read_bytes() == before
