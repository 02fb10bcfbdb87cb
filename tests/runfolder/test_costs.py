"""`costs.jsonl` after kills: what was really spent, and target gradients that are read rather than made again."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from keepset.runfolder.costs import Meter
from keepset.runfolder.run import Run


def test_what_a_killed_session_spent_is_taken_over_once(tmp_path):
    first = Run(tmp_path)
    whole = first.timed("train a")
    with whole, first.timed("losses") as spent:
        spent.update(rows=3, tokens=30)
        first.meter.note()
        open_costs = (tmp_path / "work/costs-open.json").read_bytes()
    assert [e["stage"] for e in first.costs()] == ["losses", "train a"]
    assert not (tmp_path / "work/costs-open.json").exists()
    (tmp_path / "costs.jsonl").unlink()
    (tmp_path / "work/costs-open.json").write_bytes(open_costs)  # as if it had been killed there

    second = Run(tmp_path)
    with second.lock():
        left = second.costs()
        assert [(e["stage"], e.get("tokens"), e["stopped"]) for e in left] == [
            ("train a", None, True), ("losses", 30, True)
        ]  # fmt: skip
        with second.timed("losses") as spent:
            spent["tokens"] = 12
        with second.timed("losses"):
            pass
    entries = [e for e in second.costs() if e["stage"] == "losses"]
    assert [(e.get("tokens"), e.get("stopped"), e.get("resumed")) for e in entries] == [
        (30, True, None), (12, None, True), (None, None, None)
    ]  # fmt: skip
    (tmp_path / "work/costs-open.json").write_bytes(open_costs)  # killed between taking over and deleting
    with Run(tmp_path).lock():
        assert len(second.costs()) == 4


@pytest.mark.parametrize("text", ["", "{", "[3, {}]", '[{"stage": "a"}]', "\x00", "[" * 9999])
def test_open_costs_of_any_form_do_no_harm(tmp_path, text):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/costs-open.json").write_text(text)
    run = Run(tmp_path)
    with run.lock(), run.timed("a"):
        pass
    assert [e["stage"] for e in run.costs()] == ["a"]


@pytest.mark.parametrize("left", ["", '{"stage": "b", "sec', '{"stage": "b", "seconds": 1}', "\n", "3\n"])
def test_every_line_is_an_entry_whatever_a_killed_session_left(tmp_path, left):
    """As appended lines: killed between creating the file and writing, or in the middle of a line."""
    (tmp_path / "costs.jsonl").write_text(left)
    run = Run(tmp_path)
    with run.timed("a"):
        pass
    lines = (tmp_path / "costs.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == (["b", "a"] if left.endswith("1}") else ["a"])


def test_a_reader_sees_whole_lines_and_a_kill_leaves_them(tmp_path):
    meter, path = Meter(tmp_path), tmp_path / "costs.jsonl"
    meter.add({"stage": "x" * 20_000, "seconds": 0.0})
    pid = os.fork()
    if pid == 0:
        for number in range(10**6):
            meter.add({"stage": str(number), "seconds": 0.0})
        os._exit(0)
    seen, deadline = [1], time.monotonic() + 60
    while seen[-1] < 40 and time.monotonic() < deadline:
        seen.append(len([json.loads(line) for line in path.read_text().splitlines()]))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert seen == sorted(seen) and seen[-1] >= 40
    meter.add({"stage": "last", "seconds": 0.0})
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()][-1] == "last"


def test_an_error_leaves_its_seconds(tmp_path):
    with pytest.raises(ValueError), Run(tmp_path).timed("a", rows=2):
        raise ValueError
    again = Run(tmp_path)
    with again.lock():
        assert [(e["stage"], e["rows"], e["stopped"]) for e in again.costs()] == [("a", 2, True)]


def test_long_stages_are_noted_while_they_run(tmp_path, monkeypatch):
    monkeypatch.setattr("keepset.runfolder.costs.BEAT", 0.05)
    meter = Meter(tmp_path)
    with meter.timed("a"):
        deadline = time.monotonic() + 10
        while not meter.open_path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(meter.open_path.read_text())[0]["seconds"] > 0


def test_a_kill_between_shards(tiny_run, tmp_path):
    """The target's gradients are read from disk, and tokens and rows of both sessions add up."""
    run = tmp_path / "run"
    done = tiny_run.server.run(tiny_run.recipe, run, kill="rename work/influence-*-checkpoint-4/*/00001.json")
    assert done["signal"] == signal.SIGKILL and "target gradients at checkpoint-4" in done["log"]
    targets = {p: p.stat().st_mtime_ns for p in run.glob("work/target-*/*/00000.safetensors")}
    assert len(targets) == 2
    assert tiny_run.resumed(run) == []
    assert {p: p.stat().st_mtime_ns for p in targets} == targets
    assert "target gradients at" not in (tiny_run.server.folder / "child.log").read_text()
    stage = "gradients at checkpoint-4 (adam)"
    entries = [e for e in Run(run).costs() if e["stage"] == stage]
    (undisturbed,) = [e for e in Run(tiny_run.run_dir).costs() if e["stage"] == stage]
    assert [(e.get("stopped"), e.get("resumed")) for e in entries] == [(True, None), (None, True)]
    for fact in ("rows", "tokens", "flops"):
        assert sum(e[fact] for e in entries) == undisturbed[fact]
    assert "stopped" not in undisturbed and "resumed" not in undisturbed


def test_damaged_target_gradients_are_made_again(tiny_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run.run_dir, run)
    (path,) = run.glob("work/target-checkpoint-2/*/00000.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (run / "scores/rose.parquet").unlink()
    (record,) = run.glob("work/influence-*-checkpoint-2/*/00001.json")
    record.unlink()
    assert tiny_run.resumed(run) == []
    assert path.read_bytes() == whole


def test_experts_count_by_the_share_a_token_sees() -> None:
    """Mixtral: 4 experts of three 32 x 48 matrices, 2 a token, beside attention and the router."""
    from architectures import tiny_model as tiny
    from keepset.model.flops import matrix_weights

    blocks, head = matrix_weights(tiny("mixtral"))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert (blocks, head) == (2 * (attention + 4 * 32 + 2 * 3 * 32 * 48), 400 * 32)
