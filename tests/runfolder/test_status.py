"""How far a run is, read from folders in every state, and that reading changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from keepset.errors import KeepsetError
from keepset.progress import track
from keepset.recipe import parse_recipe
from keepset.recipe_truth import ControlSpec
from keepset.runfolder import layout
from keepset.runfolder.claims import PATIENCE, Claims
from keepset.runfolder.lock import locked
from keepset.runfolder.run import Run
from keepset.runfolder.status import models, outlook, scored_labels, status, told
from tiny_recipe import quiet

RECIPE = {
    "methods": ["bm25", {"name": "rose", "label": "rose-2"}], "budget": ["5%", "20%"], "train_seeds": [0, 1],
    "controls": {"random_seeds": [3], "longest": True, "shortest": False, "full": True},
    "evaluate": {"pairs": [{"path": "e.jsonl"}]},
}  # fmt: skip


def folder(path: Path, *done: str) -> Path:
    """A run folder with some files in it."""
    for name, text in ((layout.RECIPE, yaml.safe_dump(RECIPE)), *((name, "{}") for name in done)):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file()}


def test_steps_are_those_of_a_run_in_its_order(tmp_path: Path) -> None:
    run = folder(tmp_path, layout.scores("bm25"), layout.done(layout.evaluation("bm25@5%", 1)))
    found = status(run)
    assert found.state == "unfinished" and found.done == ("score bm25", "train and evaluate bm25@5%, seed 1")
    left = [name.removeprefix("train and evaluate ") for name in found.next if name.startswith("train")]
    assert left == ["bm25@5%, seed 0", "bm25@20%, seed 0", "bm25@20%, seed 1",
                      "rose-2@5%, seed 0", "rose-2@5%, seed 1", "rose-2@20%, seed 0", "rose-2@20%, seed 1",
                      "random-3@5%, seed 0", "random-3@20%, seed 0",
                      "longest@5%, seed 0", "longest@5%, seed 1", "longest@20%, seed 0", "longest@20%, seed 1",
                      "full, seed 0", "full, seed 1"]  # fmt: skip
    assert found.next[:3] == ("score rose-2", "score random-3", "score longest")
    assert found.next[-1] == "compare and report"
    assert outlook(run, RECIPE).startswith("2 of 21 steps done; next: score random-3; 0:00 so far")


def test_a_run_under_way_says_where_it_is_who_does_it_and_what_is_left(tmp_path: Path) -> None:
    run = folder(tmp_path, layout.scores("bm25"))
    costs = ({"stage": "score bm25", "seconds": 900}, {"stage": "train a", "seconds": 60, "flops": 2e12})
    (run / layout.COSTS).write_text("\n".join(map(json.dumps, costs)) + "\n{torn")
    (run / layout.WORK_FOLDER).mkdir(exist_ok=True)
    (run / layout.PLAN).write_text(json.dumps({"total_seconds": 120.0, "total_flops": 4e12}))
    writer = Run(run)
    with writer.lock(), writer.timed("score rose-2"), writer.timed("losses", flops=1e12):
        with track(quiet(), "losses", 117, there=17) as advance:
            advance(50)
            time.sleep(0.05)
            writer.meter.note()
            before = snapshot(run)
            found = status(run)
            assert snapshot(run) == before
    assert found.state == "running" and [w.pid for w in found.workers] == [os.getpid()]
    assert [e["stage"] for e in found.now] == ["score rose-2", "losses"]
    progress = found.now[1]["progress"]
    assert (progress["done"], progress["total"], progress["unit"]) == (67, 117, "rows")
    assert 0 < progress["rate"] < 50 / 0.05
    assert found.next[0] == "score random-3" and found.planned.seconds == 120
    assert found.spent.flops == 3e12 and 60 <= found.spent.seconds < 70, "what encloses others is not counted"
    text = "\n".join(told(run, found))
    assert "losses, 67/117 rows, " in text and "rows/s" in text and " left" in text and "of about 2:00, 4 TFLOP" in text
    assert not (run / layout.OPEN_COSTS).exists()
    kept = [json.loads(line) for line in (run / layout.COSTS).read_text().splitlines() if "torn" not in line]
    assert not any("progress" in entry for entry in kept)


def test_a_killed_run_is_told_as_stopped_and_its_progress_stays_out_of_the_costs(tmp_path: Path) -> None:
    run = folder(tmp_path)
    entry = {"stage": "losses", "seconds": 5.0, "session": "a", "stopped": True,
             "progress": {"what": "losses", "done": 3, "total": 9, "unit": "rows", "rate": 1.5}}  # fmt: skip
    (run / layout.WORK_FOLDER).mkdir()
    (run / layout.OPEN_COSTS).write_text(json.dumps([entry]))
    long_ago = time.time() - 600
    os.utime(run / layout.OPEN_COSTS, (long_ago, long_ago))
    found = status(run)
    assert found.state == "stopped" and found.workers == ()
    assert "the same command goes on" in told(run, found)[-1]
    assert any("stopped at" in line and "3/9 rows" in line for line in told(run, found))
    again = Run(run)
    with again.lock():
        (left,) = again.costs()
    assert left["stage"] == "losses" and "progress" not in left


def test_another_process_is_seen_by_its_lock_without_taking_it(tmp_path: Path) -> None:
    run = folder(tmp_path)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(run / layout.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        found = status(run)
        assert [w.pid for w in found.workers] == [other.pid] and found.state == "running"
        other.communicate(b"\n")
    assert status(run).state == "unfinished"
    with locked(run):
        assert status(run).workers[0].pid == os.getpid()


def test_workers_are_told_by_what_they_claim(tmp_path: Path) -> None:
    run = folder(tmp_path)
    claims = Claims(run / layout.CLAIMS_FOLDER)
    assert claims.take("losses-3") and claims.take("models/warmup")
    (worker,) = status(run).workers
    assert worker.pid == os.getpid() and worker.alive and worker.claims == ("losses-3", "models+warmup")
    for path in (run / layout.CLAIMS_FOLDER).iterdir():
        os.utime(path, (time.time() - 2 * PATIENCE,) * 2)
    found = status(run)
    assert not found.workers[0].alive and found.state == "unfinished"
    assert "no sign of life" in told(run, found)[0]
    claims.release("losses-3"), claims.release("models/warmup")


def test_a_finished_run_and_its_last_warning(tmp_path: Path) -> None:
    every = [layout.scores(label) for label in ("bm25", "rose-2", "random-3", "longest")]
    run = folder(tmp_path, *every, *(layout.done(layout.evaluation(*m)) for m in models(RECIPE)), layout.COMPARISON)
    (run / layout.FINDINGS).write_text(json.dumps([
        {"level": "warning", "method": "a", "text": "old"}, {"level": "warning", "method": "rose-2", "text": "new"},
        {"level": "info", "method": "b", "text": "note"},
    ]))  # fmt: skip
    found = status(run)
    assert found.state == "finished" and found.next == () and found.finding == "rose-2: new"
    assert json.loads(json.dumps(found.to_json()))["state"] == "finished"


def test_a_run_that_measures_nothing_has_no_models_and_no_folder_is_refused(tmp_path: Path) -> None:
    whole = {"methods": ["bm25"], "budget": "5%", "controls": {"random_seeds": [0], "longest": True}}
    (tmp_path / layout.RECIPE).write_text(yaml.safe_dump(whole))
    assert status(tmp_path).next == ("score bm25", "score random-0", "score longest", "compare and report")
    with pytest.raises(KeepsetError, match="is no run folder"):
        status(tmp_path / "nowhere")


def test_it_starts_without_torch_and_pydantic() -> None:
    code = (
        "import sys, keepset.runfolder.status; print([m for m in ('torch', 'pydantic', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_run_folder_s_recipe_names_every_control(tmp_path: Path) -> None:
    made = parse_recipe({"run_dir": str(tmp_path), "pool": "pool.jsonl", "methods": ["bm25"], "budget": "5%"})
    whole = made.model_dump(mode="json")
    assert set(whole["controls"]) == set(ControlSpec.model_fields)
    assert scored_labels(whole) == ["bm25", *(f"random-{seed}" for seed in made.controls.random_seeds), "longest"]
