"""`make soak`, its second part: tiny whole runs on Ray and by `keepset work`, whose processes are killed; same bytes.

By turns a folder is done on three nodes of Ray, where an actor, a node (another one joins) and the driver are killed,
twice, and by four workers, of which three are killed. Then it is finished in the same way and compared with one
process's. Each kill falls when the first files of a stage come, drawn from those still to be done; an actor's and a
node's after a short random time. Exit code 1 if anything differed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import crew
import ray_nodes
from crash import TinyRun, outcome

# What comes into a folder, in the order of the stages; an actor, a node or the driver is killed when it is seen.
STAGES = (
    "work/encoding/*/*.json", "models/warmup/trainer", "models/reference/trainer", "models/warmup/done.json",
    "work/losses-base/*/*.json", "work/losses-reference/*/*.json", "work/target-*/*/*.json",
    "work/influence-*/*/00000.json", "work/influence-*/*/00001.json", "scores/rose.parquet", "scores/davir.parquet",
    "evaluation/base/*", "models/*-seed0/trainer", "models/*-seed0/done.json", "evaluation/*-seed0/*",
)  # fmt: skip
CLAIMS = ("", "models+warmup", "models+reference", "lead", "models+rose-seed0", "models+davir-seed0")
kills: Counter[str] = Counter()


class RayFolders:
    """Folders done on Ray."""

    def __init__(self, tiny: TinyRun, draw: random.Random) -> None:
        self.tiny, self.draw, self.nodes = tiny, draw, ray_nodes.Nodes(2)

    def drive(self, run: Path) -> dict[str, Any]:
        argv = ["run", str(self.tiny.recipe), "--run_dir", str(run), "--executor", "ray",
                "--address", self.nodes.address]  # fmt: skip
        return self.tiny.server.run(self.tiny.recipe, run, argv=argv, env=ray_nodes.ENV)

    def session(self, run: Path, share: float) -> list[str]:
        """Start a driver; kill an actor, a node and it, in this share of what is ahead; what went wrong."""
        over = threading.Event()
        seen = [number for number, stage in enumerate(STAGES) if list(run.glob(stage))]
        ahead = STAGES[max(seen, default=-1) + 1 :]  # a trainer's folder is gone after it
        ahead = ahead[: max(3, int(share * len(ahead)))]
        stages = sorted(self.draw.sample(range(len(ahead)), min(3, len(ahead))))
        whom = [*self.draw.sample(["actor", "node"], 2), "driver"][-len(stages) :] if stages else []

        def strike() -> None:
            for stage, who in zip(stages, whom, strict=True):
                while not over.is_set() and not list(run.glob(ahead[stage])):
                    time.sleep(0.005)
                if who != "driver":
                    time.sleep(self.draw.uniform(0, 0.5))
                if over.is_set():
                    return
                if who == "node":
                    self.nodes.kill()
                    assert self.nodes.add(), "no node joins"
                elif who == "driver":
                    ray_nodes.kill(ray_nodes.children(self.tiny.server.process.pid))
                else:
                    while not self.nodes.kill_worker() and not over.is_set():
                        time.sleep(0.05)
                kills[who] += 1

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            answer = self.drive(run)
        finally:
            over.set()
            thread.join()
        return [] if answer["signal"] == signal.SIGKILL or answer["exit"] == 0 else [answer["log"][-2000:]]

    def folder(self, run: Path) -> list[str]:
        """Do one folder in three sessions, two of them killed."""
        wrong = [*self.session(run, 0.5), *self.session(run, 1.0)]
        answer = self.drive(run)
        return wrong if answer["exit"] == 0 else [*wrong, answer["log"][-2000:]]


def work_folder(tiny: TinyRun, draw: random.Random, run: Path) -> list[str]:
    """Do one folder by four workers, three of them killed when they are at something drawn."""
    process = crew.start(tiny, run, 4)
    for what in sorted(draw.sample(range(len(CLAIMS)), 3)):
        try:
            crew.kill_who_is_at(run, CLAIMS[what], process)
        except AssertionError:  # the run was over before
            break
        kills["worker"] += 1
        time.sleep(draw.uniform(0, 0.5))
    output = process.stdout.read() if process.stdout is not None and not process.stdout.closed else ""
    process.wait()
    return [] if (run / "comparison.json").exists() else [output[-2000:]]


def main(least: int) -> int:
    """Kill at least so often; the number of folders that came out otherwise."""
    folder, draw = Path(tempfile.mkdtemp(prefix="keepset-soak-")), random.Random(least)
    start = time.monotonic()
    tiny = TinyRun(folder)
    on_ray = RayFolders(tiny, draw)
    folders = failed = 0
    try:
        while kills.total() < least:
            run = folder / f"run{folders}"
            wrong = on_ray.folder(run) if folders % 2 == 0 else work_folder(tiny, draw, run)
            if not wrong:
                got = outcome(run)
                wrong = sorted(k for k in {*got, *tiny.outcome} if got.get(k) != tiny.outcome.get(k))
            folders, failed = folders + 1, failed + bool(wrong)
            shutil.rmtree(run, ignore_errors=True)
            print(f"{dict(kills)} kills in {folders} folders, {failed} failed, {time.monotonic() - start:.0f} s"
                  + "".join(f"\nFAILED: {one}" for one in wrong), flush=True)  # fmt: skip
    finally:
        on_ray.nodes.close()
        tiny.server.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{kills.total()} kills in {folders} folders: {folders - failed} folders byte-equal, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 30) else 0)
