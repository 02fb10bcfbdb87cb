"""Ray's executor: who gets which shard is tried with a crew of threads' like; the rest, marked `ray`, on real Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from crash import outcome
from keepset.errors import KeepsetError
from keepset.runfolder.execute import Task
from keepset.runfolder.execute_ray import Event, Ray, Report, Worker, hand_out, moved, read_files, states

NUMBERS = list(range(9))


class Crew:
    """Workers that do at once what `behave(worker, number)` says: None is done, an event's kind is that event."""

    def __init__(self, room=3, behave=lambda worker, number: None):
        self.rooms, self.behave, self.hired, self.queue, self.done = room, behave, 0, deque(), []
        self.sent = []

    def room(self):
        return self.rooms(len(self.done)) if callable(self.rooms) else self.rooms

    def hire(self):
        self.hired += 1
        started = self.behave(self.hired, None)
        self.queue.append(Event(started or "there", self.hired, error=OSError("no node") if started else None))
        return self.hired

    def send(self, worker, task, number):
        self.sent.append((worker, number))
        how = self.behave(worker, number)
        if how is None:
            self.done.append(number)
            self.queue.append(Event("done", worker, Report(1, {})))
        else:
            error = how if isinstance(how, Exception) else RuntimeError("lost\nreally")
            self.queue.append(Event("failed" if isinstance(how, Exception) else how, worker, error=error))

    def events(self):
        return [self.queue.popleft()] if self.queue else []


def run(crew, **more):
    seen, workers = [], {}
    hand_out(crew, Task(print, None), NUMBERS, workers, is_there=lambda n: n in crew.done, advance=seen.append,
             write=lambda files: None, **more)  # fmt: skip
    return seen


def test_every_shard_is_made_once_by_as_many_as_there_is_room_for():
    from keepset.memory import Count

    before, crew = Count.total, Crew()
    assert sorted(run(crew)) == NUMBERS and crew.hired == 3
    assert Counter(n for _, n in crew.sent) == dict.fromkeys(NUMBERS, 1) and Count.total - before == 9


def test_a_dead_worker_is_replaced_and_its_shard_done_by_another():
    crew = Crew(behave=lambda worker, number: "gone" if worker == 2 and number is not None else None)
    assert sorted(run(crew)) == NUMBERS and crew.hired == 4
    (lost,) = [n for w, n in crew.sent if w == 2]
    assert [w for w, n in crew.sent if n == lost][-1] != 2


def test_nodes_that_join_are_used():
    crew = Crew(room=lambda done: 1 if done < 3 else 3)
    assert sorted(run(crew)) == NUMBERS and crew.hired == 3


def test_a_shard_that_ends_every_worker_stops_the_run():
    crew = Crew(behave=lambda worker, number: "gone" if number == 4 else None)
    with pytest.raises(KeepsetError, match="shard 4: 3 workers of Ray failed at it, the last: lost$"):
        run(crew)


def test_an_error_that_passes_is_tried_again_and_a_user_s_mistake_is_told_at_once():
    times = Counter()

    def twice(worker, number):
        times[number] += 1
        return MemoryError("full") if number == 5 and times[number] < 3 else None

    assert sorted(run(Crew(behave=twice))) == NUMBERS
    crew = Crew(behave=lambda worker, number: KeepsetError("pool.jsonl:3: bad") if number == 0 else None)
    with pytest.raises(KeepsetError, match="^pool.jsonl:3: bad$"):
        run(crew)


def test_a_cluster_that_starts_no_worker_is_told():
    with pytest.raises(KeepsetError, match="Ray starts no worker: no node"):
        run(Crew(behave=lambda worker, number: "gone"))


@dataclass(frozen=True)
class Argument:
    recipe: str


def write_twice(own, numbers):
    """Reads the run folder, and writes into it."""
    folder = Path(json.loads(own.recipe)["run_dir"])
    stage = folder / "work" / "s" / "k"
    stage.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        text = (folder / "models/warmup/a.safetensors").read_text() * 2
        for suffix in ("safetensors", "json"):
            (stage / f"{number:05d}.{suffix}").write_text(text)


def test_a_worker_that_does_not_see_the_folder_gets_what_it_reads_and_sends_what_it_made(tmp_path, monkeypatch):
    run_dir, far = tmp_path / "run", tmp_path / "far"
    (run_dir / "models/warmup").mkdir(parents=True)
    (run_dir / "models/warmup/a.safetensors").write_text("weights")
    (run_dir / "scores").mkdir()
    (run_dir / "scores/x.parquet").write_text("not read")
    task = Task(write_twice, Argument(json.dumps({"run_dir": str(run_dir), "seed": 3})), "s", ("models/warmup",))
    worker = Worker()
    assert not worker.hello(str(run_dir), "word")[1]
    (run_dir / "work").mkdir()
    (run_dir / "work/ray-word").write_text("word")
    assert worker.hello(str(run_dir), "word")[1] and not worker.hello(str(run_dir), "other")[1]

    far.mkdir()
    for name, data in read_files(run_dir, task.reads).items():
        (far / name).parent.mkdir(parents=True)
        (far / name).write_bytes(data)
    before = states(far)
    worker.do(moved(task, far), 7)
    made = [name for name, state in states(far).items() if before.get(name) != state]
    assert sorted(made) == ["work/s/k/00007.json", "work/s/k/00007.safetensors"]

    written = []
    monkeypatch.setattr("keepset.runfolder.execute_ray.write_atomic", lambda path, data: written.append(path.name))
    Ray(run_dir, None).write({**read_files(far, made), "models/x/done.json": b"", "models/x/w.safetensors": b""})
    assert written.index("00007.json") > written.index("00007.safetensors")
    assert written[-1] == "done.json"
    with pytest.raises(KeepsetError, match="leads out of the run folder"):
        Ray(run_dir, None).write({"../x": b""})


# -- real Ray ---------------------------------------------------------------------------------------------------------

BLIND = """
import sys
from pathlib import Path
import keepset.runfolder.execute_ray as module
hire = module.RayCrew.hire
def elsewhere(self):  # the workers look for the run folder where it isn't
    self.folder, folder = Path("/not-there"), self.folder
    try:
        return hire(self)
    finally:
        self.folder = folder
module.RayCrew.hire = elsewhere
sys.argv = ["keepset", *sys.argv[1:]]
from keepset.cli import main
main()
"""


def ray_run(tiny_run, folder, *command):
    recipe = yaml.safe_load(tiny_run.recipe.read_text())
    recipe |= {"run_dir": str(folder), "executor": {"name": "ray", "workers": 2}}
    recipe["batching"]["shard_rows"] = 9
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.Popen(
        [sys.executable, *command, "run", str(path)], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip


def finished(process):
    """What a run printed that must end well."""
    try:
        log, _ = process.communicate(timeout=700)
    finally:
        process.kill()
    assert process.returncode == 0, log
    return log


def actors(pattern="^ray::.*(Worker|do|hello)"):
    """Process ids of Ray's actors on this machine."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()]


@pytest.fixture
def no_agents_left():
    """A driver that is killed leaves two of Ray's helpers behind."""
    foreign = set(actors("^ray::.*Agent"))
    yield
    for pid in set(actors("^ray::.*Agent")) - foreign:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
def test_an_actor_and_then_the_driver_are_killed_and_the_bytes_are_those_of_one_process(
    tiny_run, tmp_path, no_agents_left
):
    pytest.importorskip("ray")
    folder, foreign, killed = tmp_path / "run", set(actors()), []

    def kill_one():
        while not list(folder.glob("work/target-*/*/*.json")):
            time.sleep(0.05)
        mine = [pid for pid in actors() if pid not in foreign]
        os.kill(mine[0], signal.SIGKILL)
        killed.append(mine[0])

    first = ray_run(tiny_run, folder, "-m", "keepset")
    try:
        threading.Thread(target=kill_one, daemon=True).start()
        while not (folder / "scores/davir.parquet").exists():
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    log = finished(ray_run(tiny_run, folder, "-m", "keepset"))
    assert killed and outcome(folder) == tiny_run.outcome, log


@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_workers_that_do_not_see_the_folder_send_the_same_bytes(tiny_run, tmp_path):
    pytest.importorskip("ray")
    log = finished(ray_run(tiny_run, tmp_path / "run", "-c", BLIND))
    assert "doesn't see the run folder: its results come back here" in log
    assert outcome(tmp_path / "run") == tiny_run.outcome, log
