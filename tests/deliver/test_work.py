"""`keepset work`: several processes on one run folder, some of them killed, end with the bytes of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from crash import outcome
from keepset.runfolder.claims import Claims

WARM = """
import os, sys
import keepset.deliver.work as module
import peft, torch, trl  # once for all
from keepset.recipe import load_recipe
from keepset.stopping import Stopped, stop_on_signals
from rich.console import Console
torch.set_num_threads(1)
pids = []
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if pid == 0:
        os.environ.update(SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_COUNT=sys.argv[2])
        log = Console(file=open(f"{sys.argv[1]}.{number}.log", "w"), width=200)
        module.work(load_recipe(sys.argv[1]), console=log, out=log, patience=float(sys.argv[3]))
        log.file.flush()
        os._exit(0)
    pids.append(pid)
sys.exit(max(os.WEXITSTATUS(status) for status in (os.waitpid(pid, 0)[1] for pid in pids)))
"""


def start(tiny_run, folder, workers, patience=2.0):
    recipe = {**yaml.safe_load(tiny_run.recipe.read_text()), "run_dir": str(folder)}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    argv = [sys.executable, "-c", WARM, str(path), str(workers), str(patience)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def kill_who_is_at(folder, what, process):
    """Kill the process that has a claim whose name begins so, once it has it."""
    while process.poll() is None:
        for path in (folder / "work/claims").glob(f"{what}*.0"):
            try:
                pid = int(path.read_text().split(":")[1])
            except (OSError, IndexError):
                continue
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.002)
    raise AssertionError(process.stdout.read())


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
