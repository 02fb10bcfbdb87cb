"""What a run does when the machine stops it: signals, full disks, folders that can't be written, a second run."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from keepset.runfolder.run import Run
from keepset.stopping import Stopped, out_of_memory, stop_on_signals, system_trouble


def last_line(done: dict) -> str:
    return str(done["log"]).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "point"),
    [
        (signal.SIGTERM, "step 2 models/warmup"),
        (signal.SIGINT, "sync work/influence-*-checkpoint-4/*/00000.safetensors.part"),
        pytest.param(signal.SIGTERM, "save models/reference/trainer/checkpoint-5/optimizer.pt", marks=pytest.mark.slow),
    ],
)
def test_signals_end_with_their_code_and_the_run_goes_on(tiny_run, tmp_path, number, point):
    done = tiny_run.server.run(tiny_run.recipe, tmp_path / "run", at=point, signal=number)
    assert done["exit"] == 128 + number, done["log"]
    assert last_line(done) == f"keepset: stopped ({number.name}); the same command goes on where it was"
    assert "Traceback" not in done["log"]
    assert tiny_run.resumed(tmp_path / "run") == []


@pytest.mark.parametrize("limit", [pytest.param(1000, marks=pytest.mark.slow), 9000])
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on(tiny_run, tmp_path, limit):
    """A limit on the size of files stands for the full disk: the same error at the same calls, without root."""
    done = tiny_run.server.run(tiny_run.recipe, tmp_path / "run", limit=limit)
    assert done["exit"] == 2, done["log"]
    assert last_line(done).startswith("keepset: ") and "Traceback" not in done["log"]
    assert "File too large" in last_line(done) or "file write failed" in last_line(done)
    assert tiny_run.resumed(tmp_path / "run") == []


@pytest.mark.parametrize("place", ["/proc/keepset", "/sys/keepset", "FILE/run"])
def test_a_folder_that_cannot_be_written_is_one_line(tiny_run, tmp_path, place):
    (tmp_path / "file").write_text("")
    done = tiny_run.server.run(tiny_run.recipe, Path(place.replace("FILE", str(tmp_path / "file"))))
    assert done["exit"] == 2 and "can't be written" in last_line(done) and "Traceback" not in done["log"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tiny_run, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    done = tiny_run.server.run(tiny_run.recipe, tmp_path / "run")
    assert done["exit"] == 2 and "can't be written" in last_line(done)


def test_a_second_run_of_one_folder_is_refused(tiny_run, tmp_path):
    with Run(tmp_path / "run").lock():
        done = tiny_run.server.run(tiny_run.recipe, tmp_path / "run")
    assert done["exit"] == 2 and "another keepset process works in this folder" in last_line(done)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"]
    assert tiny_run.resumed(tmp_path / "run") == []


def test_a_lock_does_not_outlive_its_process(tiny_run, tmp_path):
    killed = tiny_run.server.run(tiny_run.recipe, tmp_path / "run", kill="step 1 models/warmup")
    assert killed["signal"] == signal.SIGKILL
    with Run(tmp_path / "run").lock():
        pass


def test_a_bad_setting_is_one_line(tiny_run, tmp_path):
    argv = ["run", str(tiny_run.recipe), "--run_dir", str(tmp_path / "run"), "--set", "budget=[1"]
    done = tiny_run.server.run(tiny_run.recipe, tmp_path / "run", argv=argv)
    assert done["exit"] == 2 and "--set 'budget=[1': not YAML" in last_line(done) and "Traceback" not in done["log"]


def test_signals_raise_what_nobody_catches_by_accident():
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop_on_signals()
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.exit_code == 143 and not isinstance(stopped.value, Exception)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def wrapped(error: Exception) -> Exception:
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (wrapped(OSError(errno.EROFS, "Read-only file system")), "Read-only file system"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing"), "can't be"),
        (MemoryError(), "out of memory; lower batching.token_budget"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), "out of memory"),
        (ValueError("odd"), None),
        (OSError(errno.ENOENT, "No such file"), None),
    ],
)
def test_troubles_of_the_machine_are_told_from_bugs(error, text):
    found = system_trouble(error)
    assert found is None if text is None else (found is not None and text in found and "\n" not in found)


def test_what_counts_as_out_of_memory():
    torch = pytest.importorskip("torch")
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert out_of_memory(caught.value) or "allocate" in str(caught.value)
    assert not out_of_memory(RuntimeError("shapes don't fit"))


def test_costs_are_json_lines(tiny_run):
    for line in (tiny_run.run_dir / "costs.jsonl").read_text().splitlines():
        assert json.loads(line)["seconds"] >= 0
