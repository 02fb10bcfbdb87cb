"""`keepset work`: several processes on one run folder, some of them killed, end with the bytes of one process."""

from __future__ import annotations

import json

import pytest

from crash import outcome
from crew import kill_who_is_at, start
from keepset.runfolder.claims import Claims


def test_a_worker_that_trains_and_the_one_that_leads_are_killed(tiny_run, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_run, folder, 4)
    killed = {kill_who_is_at(folder, what, process) for what in ("models+warmup", "lead")}
    output, _ = process.communicate(timeout=240)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert outcome(folder) == tiny_run.outcome, output + logs
    assert len(killed) == 2 and output.count("gave no sign of life for 2 s; taken over") >= 2
    assert logs.count("report: ") == 1, "one leads to the end"
    assert not list((folder / "work/costs").glob("*.json"))
    trained = [json.loads(line)["stage"] for line in (folder / "costs.jsonl").read_text().splitlines()]
    assert {"train models/reference", "train models/rose-seed0", "evaluate davir-seed0"} <= set(trained)


def test_a_run_of_its_own_and_workers_do_not_meet(tiny_run, tmp_path):
    folder = tmp_path / "run"
    claims = Claims(folder / "work/claims", 1.0)
    assert claims.take("models/warmup")
    done = tiny_run.server.run(tiny_run.recipe, folder)
    assert done["exit"] == 2 and "`keepset work` is at it" in done["log"]
    claims.release("models/warmup")


@pytest.mark.slow
def test_one_worker_alone_does_the_whole_run(tiny_run, tmp_path):
    process = start(tiny_run, tmp_path / "run", 1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and outcome(tmp_path / "run") == tiny_run.outcome, output
