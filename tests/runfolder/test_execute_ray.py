"""Ray's executor: who gets which shard is tried with a crew of threads' like; the rest, marked `ray`, on real Ray."""

from __future__ import annotations

import json
import os
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

import ray_nodes
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


def stored(folder):
    """The bytes of all scores and of every shard."""
    paths = [*folder.glob("scores/*.parquet"), *folder.glob("work/*/*/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wait_for(folder, pattern):
    """Until a file is there; whether it is."""
    end = time.monotonic() + 200
    while not (there := bool(list(folder.glob(pattern)))) and time.monotonic() < end:
        time.sleep(0.005)
    return there


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_node_of_three_and_then_the_driver_are_killed_and_the_bytes_are_those_of_one_process(tiny_run, tmp_path):
    pytest.importorskip("ray")
    recipe = yaml.safe_load(tiny_run.recipe.read_text())
    del recipe["evaluate"]  # it ends when the rows are chosen
    recipe |= {"methods": ["davir", "rose", "rds"], "reference": {"path": str(tiny_run.run_dir / "models/reference")},
               "warmup": {"path": str(tiny_run.run_dir / "models/warmup")}}  # fmt: skip
    recipe["batching"]["shard_rows"] = 1
    path, folder = tmp_path / "scores.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    server = tiny_run.server
    assert server.run(path, tmp_path / "one")["exit"] == 0
    nodes, at_kills = ray_nodes.Nodes(2), []

    def kill_both():
        for pattern, kill in [
            ("work/losses-*/*/*.json", nodes.kill),
            ("work/influence-*/*/*.json", lambda: ray_nodes.kill(ray_nodes.children(server.process.pid))),
        ]:
            if wait_for(folder, pattern):
                kill()
                at_kills.append(len(list(folder.glob(pattern))))

    try:
        driver = {
            "env": ray_nodes.ENV,
            "argv": ["run", str(path), "--run_dir", str(folder), "--executor", "ray", "--address", nodes.address],
        }
        killer = threading.Thread(target=kill_both, daemon=True)
        killer.start()
        first = server.run(path, folder, **driver)
        killer.join(30)
        assert first["signal"] == signal.SIGKILL and "3 workers, one a core" in first["log"], first["log"]
        assert at_kills[0] < 2 * 17 and at_kills[1] < 2 * 17, "both in the middle of their pass"
        assert not list(folder.glob("work/representations-last/*/*.json"))
        again = server.run(path, folder, **driver)
    finally:
        nodes.close()
    assert again["exit"] == 0 and "2 workers, one a core" in again["log"], again["log"]
    one = stored(tmp_path / "one")
    assert stored(folder) == one
    assert {name.split("/")[1].split("-")[0] for name in one} >= {"losses", "influence", "representations", "encoding"}


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
        env={**os.environ, **ray_nodes.ENV, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        start_new_session=True,
    )  # fmt: skip


def finished(process):
    """What a run printed that must end well."""
    try:
        log, _ = process.communicate(timeout=700)
    finally:
        ray_nodes.kill_session(process)
    assert process.returncode == 0, log
    return log


def actors(process):
    """Process ids of Ray's actors of a driver."""
    mine = [pid for pid, (_, session) in ray_nodes.processes().items() if session == process.pid]
    return [pid for pid in mine if "Worker" in ray_nodes.command(pid)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_actor_and_then_the_driver_are_killed_and_the_bytes_are_those_of_one_process(tiny_run, tmp_path):
    pytest.importorskip("ray")
    folder, killed = tmp_path / "run", []

    def kill_one():
        while not list(folder.glob("work/target-*/*/*.json")):
            time.sleep(0.05)
        killed.extend(actors(first)[:1])
        ray_nodes.kill(killed)

    first = ray_run(tiny_run, folder, "-m", "keepset")
    try:
        threading.Thread(target=kill_one, daemon=True).start()
        while not (folder / "scores/davir.parquet").exists():
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.05)
    finally:
        ray_nodes.kill_session(first)  # a driver that is killed leaves two of Ray's agents behind
    log = finished(ray_run(tiny_run, folder, "-m", "keepset"))
    assert killed and outcome(folder) == tiny_run.outcome, log


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_workers_that_do_not_see_the_folder_send_the_same_bytes(tiny_run, tmp_path):
    pytest.importorskip("ray")
    log = finished(ray_run(tiny_run, tmp_path / "run", "-c", BLIND))
    assert "doesn't see the run folder: its results come back here" in log
    assert outcome(tmp_path / "run") == tiny_run.outcome, log
