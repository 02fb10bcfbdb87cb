"""Workers of `keepset work` on a tiny run, forked from one warm process; who is at a claimed piece can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from crash import TinyRun

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


def start(tiny_run: TinyRun, folder: Path, workers: int, patience: float = 2.0) -> subprocess.Popen[str]:
    """Start so many workers on a folder; the process returned is their parent, which waits for them."""
    recipe = {**yaml.safe_load(tiny_run.recipe.read_text()), "run_dir": str(folder)}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    argv = [sys.executable, "-c", WARM, str(path), str(workers), str(patience)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def kill_who_is_at(folder: Path, what: str, process: subprocess.Popen[str]) -> int:
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
    raise AssertionError(f"nobody was at {what}: {process.communicate()[0]}")
