"""Several processes on one stage: the same bytes, and nothing lost when one of them, or all, are killed."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from keepset.memory import Count
from keepset.runfolder.run import Run

IDS = np.array([f"{i:03d}" for i in range(40)], dtype=object)
KEY = {"s": {"k": 1}}


def sweep(folder: Path, workers: int, compute=lambda i: i.astype(float), **more):
    def both(indices, missing):
        return {"s": {"x": compute(indices), "pid": np.full(len(indices), os.getpid())}}

    return Run(folder).sweep(KEY, IDS, both, shard_rows=4, workers=workers, **more)["s"]


@pytest.mark.parametrize("workers", [2, 3, 50])
def test_shards_are_shared_out_and_counted_once(tmp_path, workers):
    counted, done = [], []
    out = sweep(tmp_path, workers, spent=lambda i, m: counted.extend(i.tolist()), advance=done.append)
    assert out["x"].tolist() == list(range(40)) and sorted(counted) == list(range(40)) and sum(done) == 40
    assert len(set(out["pid"])) == min(workers, 9) + 1  # the first shard is the parent's
    again: list[int] = []
    assert sweep(tmp_path, workers, spent=lambda i, m: again.extend(i))["x"].tolist() == list(range(40)) and not again


@pytest.mark.parametrize("how", ["killed", "error", "stopped"])
def test_what_a_lost_worker_lacked_is_computed_by_the_parent(tmp_path, how, caplog):
    parent = os.getpid()

    def compute(indices):
        if os.getpid() != parent and 20 in indices:
            if how == "error":
                raise MemoryError("no more\nreally")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)
        return indices.astype(float)

    with caplog.at_level(logging.WARNING):
        out = sweep(tmp_path, 3, compute)
    assert out["x"].tolist() == list(range(40)) and out["pid"][20] == parent
    said = {
        "killed": "was ended by SIGKILL",
        "stopped": "was ended by SIGTERM",
        "error": "ended with an error (exit code 1)",
    }[how]
    assert f"a worker {said}" in caplog.text and "computed here" in caplog.text
    # others' shards were kept, and those that the lost one had finished
    assert (out["pid"] == parent).sum() < 40 - 4 * 3


def test_an_error_of_the_rows_is_raised_by_the_parent(tmp_path):
    def compute(indices):
        if 20 in indices:
            raise ValueError("row 20")
        return indices.astype(float)

    with pytest.raises(ValueError, match="row 20"):
        sweep(tmp_path, 2, compute)
    assert sweep(tmp_path, 2)["x"].tolist() == list(range(40))


def test_a_parent_that_stops_takes_its_workers_with_it(tmp_path):
    def compute(indices):
        if 0 not in indices:
            (tmp_path / f"worker-{os.getpid()}").touch()
            time.sleep(30)
        return indices.astype(float)

    class Enough(BaseException):
        pass

    def stop(number, frame):
        raise Enough

    old = signal.signal(signal.SIGUSR1, stop)
    killer = os.fork()
    if killer == 0:
        while len(list(tmp_path.glob("worker-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGUSR1)
        os._exit(0)
    try:
        with pytest.raises(Enough):
            sweep(tmp_path, 2, compute)
    finally:
        os.waitpid(killer, 0)
        signal.signal(signal.SIGUSR1, old)
    for path in tmp_path.glob("worker-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("worker-")), 0)


def test_halved_batches_of_workers_are_counted(tmp_path):
    from keepset.memory import in_halves

    def compute(indices):
        def some(part):
            if len(part) > 2:
                raise MemoryError

        in_halves(indices, some)
        return indices.astype(float)

    before = Count.total
    sweep(tmp_path, 2, compute)
    assert Count.total - before == 10


# -- a real run -----------------------------------------------------------------------------------------------------


def numbers(run: Path) -> dict[str, str]:
    """Hashes of scores, shards, target gradients and subsets."""
    found = sorted([*run.glob("scores/*.parquet"), *run.glob("work/*/*/*.safetensors"), *run.glob("subsets/*.jsonl")])
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(scope="module")
def scoring(tiny_run, tmp_path_factory):
    """Scoring alone, in shards of 2 rows; the numbers of one process."""

    def run(folder: Path, workers: int, **request):
        settings = ["batching.shard_rows=2", f"batching.workers={workers}", "methods=[rose, davir, rds]"]
        settings += ["evaluate.pairs=[]"]
        argv = ["run", str(tiny_run.recipe), "--run_dir", str(folder)]
        return tiny_run.server.run(
            tiny_run.recipe, folder, argv=[*argv, *(a for s in settings for a in ("--set", s))], **request
        )

    folder = tmp_path_factory.mktemp("one") / "run"
    done = run(folder, 1)
    assert done["exit"] == 0, done["log"]
    return run, numbers(folder)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_scores_have_the_same_bytes_whatever_the_number_of_workers(scoring, tmp_path, workers):
    run, want = scoring
    done = run(tmp_path / "run", workers)
    assert done["exit"] == 0 and "a worker" not in done["log"], done["log"]
    assert numbers(tmp_path / "run") == want and len(want) > 40


def test_a_worker_is_killed_and_then_the_whole_run(scoring, tmp_path):
    """The worker's end is noticed; its parent, killed at the same point, is resumed with other workers."""
    run, want = scoring
    folder = tmp_path / "run"
    done = run(folder, 3, kill="rename work/losses-base/*/00004.json")
    assert done["signal"] == signal.SIGKILL and "a worker was ended by SIGKILL" in done["log"], done["log"]
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("work/losses-base/*/*.json") if p.stem.isdigit()}
    assert len(kept) >= 9 - 3  # the first shard and the others' are there: one worker's share at most is missing
    done = run(folder, 2)
    assert done["exit"] == 0 and numbers(folder) == want, done["log"]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
