"""The run folder: shards that resume, checksums that hold, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.errors import KeepsetError, PlanMismatch
from keepset.recipe import DataSpec, parse_recipe
from keepset.runfolder.files import digest
from keepset.runfolder.run import Run
from keepset.runfolder.shards import plan_shards, read_shard

IDS = np.array([f"{i * 7919 % 1000:03d}-row" for i in range(100)], dtype=object)
KEY = {"model": "m", "version": 1}


def square(indices, missing):
    return {
        name: {"x": indices.astype(np.float64) ** 2, "v": np.stack([indices, indices + 1], axis=1)} for name in missing
    }


def sweep(folder: Path, compute=square, ids=IDS, **more):
    return Run(folder).sweep({"stage": KEY}, ids, compute, shard_rows=16, **more)["stage"]


def stage_folder(folder: Path) -> Path:
    return folder / "work" / "stage" / digest(KEY)[:16]


def recipe(**more):
    return parse_recipe({"pool": "a.jsonl", "methods": ["davir"], **more})


@given(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60), st.integers(1, 20), st.randoms())
@settings(max_examples=100, deadline=None)
def test_shards_hold_every_row_once_and_do_not_depend_on_order(ids, rows, random):
    shuffled = list(ids)
    random.shuffle(shuffled)
    plans = [
        [list(np.array(order, dtype=object)[shard]) for shard in plan_shards(np.array(order, dtype=object), rows)]
        for order in (ids, shuffled)
    ]
    assert plans[0] == plans[1]
    assert sorted(i for shard in plans[0] for i in shard) == sorted(ids)
    assert all(len(shard) <= rows for shard in plans[0])


def test_columns_come_back_in_the_order_of_the_ids(tmp_path):
    out = sweep(tmp_path)
    assert np.array_equal(out["x"], np.arange(100.0) ** 2)
    assert np.array_equal(out["v"], np.stack([np.arange(100), np.arange(100) + 1], axis=1))


def test_a_second_sweep_computes_nothing(tmp_path):
    first = sweep(tmp_path)
    again = sweep(tmp_path, compute=lambda indices, missing: pytest.fail("computed again"))
    assert np.array_equal(first["x"], again["x"])
    assert Run(tmp_path).complete("stage", KEY, IDS, 16)


def test_a_crash_redoes_only_the_shard_it_was_in(tmp_path):
    calls = []

    def crash(indices, missing):
        if len(calls) == 3:
            raise RuntimeError("power cut")
        calls.append(len(indices))
        return square(indices, missing)

    with pytest.raises(RuntimeError):
        sweep(tmp_path, compute=crash)
    assert len(calls) == 3
    redone = []
    out = sweep(tmp_path, compute=lambda i, m: (redone.append(len(i)), square(i, m))[1])
    assert sum(redone) == 100 - sum(calls)
    assert np.array_equal(out["x"], np.arange(100.0) ** 2)


def test_only_the_missing_stage_is_computed_in_a_shared_pass(tmp_path):
    run, seen = Run(tmp_path), []
    run.sweep({"a": KEY}, IDS, square, shard_rows=16)

    def compute(indices, missing):
        seen.append(tuple(missing))
        return square(indices, missing)

    out = run.sweep({"a": KEY, "b": {**KEY, "k": 2}}, IDS, compute, shard_rows=16)
    assert set(seen) == {("b",)}
    assert np.array_equal(out["a"]["x"], out["b"]["x"])


DAMAGE = {
    "cut to half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "minus one byte": lambda data: data[:-1],
    "one bit": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "one late bit": lambda data: data[:-2] + bytes([data[-2] ^ 8]) + data[-1:],
}


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("kind", [*DAMAGE, "swapped with another shard", "deleted"])
def test_a_damaged_shard_is_found_and_alone_computed_again(tmp_path, kind, suffix):
    whole = sweep(tmp_path)
    folder = stage_folder(tmp_path)
    victim, other = folder / f"00002.{suffix}", folder / f"00003.{suffix}"
    if kind == "deleted":
        victim.unlink()
    elif kind.startswith("swapped"):
        victim.write_bytes(other.read_bytes())
    else:
        victim.write_bytes(DAMAGE[kind](victim.read_bytes()))
    assert read_shard(folder, 2, "any") is None
    redone = []
    out = sweep(tmp_path, compute=lambda i, m: (redone.append(len(i)), square(i, m))[1])
    assert redone == [16]
    assert all(np.array_equal(out[k], whole[k]) for k in whole)


def test_swapping_shard_and_record_together_is_found(tmp_path):
    sweep(tmp_path)
    folder = stage_folder(tmp_path)
    for suffix in ("safetensors", "json"):
        (folder / f"00002.{suffix}").write_bytes((folder / f"00003.{suffix}").read_bytes())
    redone = []
    sweep(tmp_path, compute=lambda i, m: (redone.append(len(i)), square(i, m))[1])
    assert redone == [16]


KILLED = """
import os, signal, sys
import numpy as np
from keepset.runfolder.run import Run
from keepset.runfolder import run as module
ids = np.array([f"{i:04d}" for i in range(64)], dtype=object)
stop = int(sys.argv[2])
counter = [0]
real = os.fsync
def fsync(fd):
    counter[0] += 1
    if counter[0] == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    real(fd)
os.fsync = fsync
def compute(indices, missing):
    return {m: {"x": np.sqrt(indices.astype(np.float64))} for m in missing}
out = Run(sys.argv[1]).sweep({"s": {"k": 1}}, ids, compute, shard_rows=8)
print(out["s"]["x"].tobytes().hex())
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    script = folder / "work.py"
    script.write_text(textwrap.dedent(KILLED))
    done = subprocess.run([sys.executable, script, folder / "b", "0"], capture_output=True, text=True, check=True)
    return (
        script,
        done.stdout,
        {str(p.relative_to(folder / "b")): p.read_bytes() for p in folder.rglob("*.safetensors")},
    )


@pytest.mark.parametrize(
    "stop", [1, 4, 9, 20, 33, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3, 5, 6, 7, 12, 15, 24, 29))]
)
def test_kill_at_any_sync_then_resume_gives_the_same_bytes(tmp_path, undisturbed, stop):
    script, output, want = undisturbed
    killed = subprocess.run([sys.executable, script, tmp_path / "a", str(stop)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    resumed = subprocess.run([sys.executable, script, tmp_path / "a", "0"], capture_output=True, text=True)
    assert resumed.returncode == 0
    assert resumed.stdout == output != ""
    left = {str(p.relative_to(tmp_path / "a")): p.read_bytes() for p in (tmp_path / "a").rglob("*.safetensors")}
    assert left == want


def test_a_changed_recipe_is_refused_and_says_what_changed(tmp_path):
    run = Run(tmp_path)
    run.adopt(recipe(budget="5%"))
    with pytest.raises(PlanMismatch, match=r"budget: \['5%'\] -> \['10%'\]") as caught:
        run.adopt(recipe(budget="10%"))
    assert caught.value.exit_code == 3
    run.adopt(recipe(budget="10%"), force=True)
    assert run.recipe().budget == ["10%"]


def test_a_key_the_folder_does_not_know_yet_has_its_default(tmp_path):
    run = Run(tmp_path)
    run.adopt(recipe())
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if not line.startswith("strict:")))
    run.adopt(recipe())
    file.write_text(file.read_text() + "gone: 1\n")  # and one that is gone is a difference
    with pytest.raises(PlanMismatch, match="gone: 1 -> None"):
        run.adopt(recipe())


def test_a_method_may_be_added(tmp_path):
    run = Run(tmp_path)
    run.adopt(recipe())
    run.adopt(recipe(methods=["davir", "random"]))
    assert [m.name for m in run.recipe().methods] == ["davir", "random"]


def test_two_processes_cannot_share_a_folder(tmp_path):
    with Run(tmp_path).lock(), pytest.raises(KeepsetError, match="another keepset process"), Run(tmp_path).lock():
        pass


def test_step_is_done_once_and_again_when_its_files_are_damaged(tmp_path):
    run, calls = Run(tmp_path), []

    def work(path):
        calls.append(1)
        (path / "w.json").write_text("{}")
        return {"seconds": 1.5}

    assert run.step("models/a", {"k": 1}, work) == {"seconds": 1.5, "reused": False}
    assert run.step("models/a", {"k": 1}, work)["reused"]
    (tmp_path / "models/a/w.json").write_text("{ }")
    assert not run.step("models/a", {"k": 1}, work)["reused"]
    assert not run.step("models/a", {"k": 2}, work)["reused"]
    assert len(calls) == 3


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeepsetError, match="No space left on device"):
        Run(tmp_path).save_json("a.json", {})


def test_costs_survive_a_torn_line(tmp_path):
    run = Run(tmp_path)
    with run.timed("a", rows=3) as spent:
        spent["flops"] = 2.0
    with (tmp_path / "costs.jsonl").open("a") as file:
        file.write('{"stage": "b", "sec')
    assert [(c["stage"], c["flops"]) for c in run.costs()] == [("a", 2.0)]


def test_damaged_json_and_parquet_are_named(tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(KeepsetError, match="comparison.json: damaged"):
        Run(tmp_path).load_json("comparison.json")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(KeepsetError, match="a.parquet: damaged"):
        Run(tmp_path).load_table("scores/a.parquet")
    with pytest.raises(KeepsetError, match="scores has: a"):
        Run(tmp_path).load_table("scores/b.parquet")


def test_records_are_json_with_their_checksum(tmp_path):
    sweep(tmp_path)
    record = json.loads((stage_folder(tmp_path) / "00000.json").read_text())
    assert record["rows"] == 16 and len(record["sha256"]) == 64


def test_json_that_is_written_is_json(tmp_path):
    Run(tmp_path).save_json("a.json", {"x": [1.5, float("nan"), (float("-inf"), "NaN")], "é": {"y": float("inf")}})
    assert '"é"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert Run(tmp_path).load_json("a.json") == {"x": [1.5, None, [None, "NaN"]], "é": {"y": None}}


def test_a_run_folder_is_found_its_files_from_anywhere(tmp_path, monkeypatch):
    """Started in `a` by relative paths: opened elsewhere it means the same files, also once all was moved."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "pool.jsonl").write_text("{}")  # `b` has one of that name too, which is not meant
    made = parse_recipe({"pool": "pool.jsonl", "methods": ["random"], "seed": 3})
    monkeypatch.chdir(a)
    Run("runs/x").adopt(made)
    assert Run("runs/x").recipe().pool[0].path == "pool.jsonl"
    stored = Path("runs/x/recipe.yaml").read_bytes()
    monkeypatch.chdir(b)
    found = Run("../a/runs/x").recipe()
    assert found.pool[0].path == str(a / "pool.jsonl")
    Run("../a/runs/x").adopt(found)  # the same by its absolute path, and by the way from here
    Run("../a/runs/x").adopt(found.model_copy(update={"pool": [DataSpec(path="../a/pool.jsonl")]}))
    assert (a / "runs/x/recipe.yaml").read_bytes() == stored
    with pytest.raises(PlanMismatch, match=r"a/pool\.jsonl.* -> .*b/pool\.jsonl"):
        Run("../a/runs/x").adopt(made)
    monkeypatch.chdir(a)
    Run("runs/x").adopt(made)
    a.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert Run("moved/runs/x").recipe().pool[0].path == str(tmp_path / "moved" / "pool.jsonl")
