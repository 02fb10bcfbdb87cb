"""Shards and trainings on Ray's actors (`pip install 'keepset[ray]'`): one a GPU, or one a core.

Ray carries numbers of shards and nothing that has to last: what counts is what lies in the run folder, so Ray may
lose anything. An actor that dies is replaced, and its shard is handed out again; nodes may come and go. `hand_out`
decides who does what and knows no Ray; `RayCrew` starts actors and talks to them.

Where an actor doesn't see the run folder (it looks for the driver's word in `work/ray-word`) it gets the files that the
task reads, once, works in a folder of its own, and sends what it made back to the driver, which writes it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from keepset.errors import KeepsetError, first_line
from keepset.memory import Count
from keepset.runfolder import layout
from keepset.runfolder.execute import Task
from keepset.runfolder.files import share_folder, write_atomic

log = logging.getLogger(__name__)

TRIES = 3  # workers that a shard may end before the run is stopped
LOOK_EVERY = 1.0  # seconds between looks at the cluster
SEEN_WITHIN = 60.0  # seconds in which another machine's file is to be seen here
SAY_EVERY = 60.0  # seconds between lines that no worker could be started

Files = dict[str, bytes]


@dataclass(frozen=True)
class Report:
    """What a worker made of a shard: batches that it halved, and its files where it doesn't see the run folder."""

    halved: int
    files: Files


@dataclass(frozen=True)
class Event:
    """What a worker tells: it is there, it has done its shard, its shard failed, or it is gone."""

    kind: Literal["there", "done", "failed", "gone"]
    worker: Any
    report: Report | None = None
    error: Exception | None = None


class Crew(Protocol):
    """Whoever starts workers and talks to them."""

    def room(self) -> int:
        """How many workers there can be at present."""

    def hire(self) -> Any:
        """Start a worker; an event tells when it is there."""

    def send(self, worker: Any, task: Task, number: int) -> None:
        """Have a worker do a shard; an event tells how it ended."""

    def events(self) -> list[Event]:
        """What happened; waits for something for a while."""


def hand_out(
    crew: Crew, task: Task, numbers: Sequence[int], workers: dict[Any, bool], *,
    is_there: Callable[[int], bool], advance: Callable[[int], None], write: Callable[[Files], None],
) -> None:  # fmt: skip
    """Have shards made by a crew; returns when all are there.

    Args:
        crew: who works.
        task: what makes them.
        numbers: the shards.
        workers: those of earlier calls, and whether each is there yet; changed in place.
        is_there: whether a shard is committed.
        advance: called with every shard that is.
        write: puts files that a worker sent into the run folder.

    Raises:
        KeepsetError: what a worker met that the user can mend, or a shard ended `TRIES` workers.
    """
    waiting, at, tries, lost = deque(numbers), dict[Any, int](), Counter[int](), 0
    said = time.monotonic()

    def again(worker: Any, error: Exception | None) -> None:
        number = at.pop(worker)
        tries[number] += 1
        waiting.appendleft(number)
        if isinstance(error, KeepsetError):
            raise error
        why = first_line(error) if error is not None else "it isn't there"
        if tries[number] >= TRIES:
            raise KeepsetError(f"shard {number}: {TRIES} workers of Ray failed at it, the last: {why}")
        log.warning("shard %d goes to another worker of Ray: %s", number, why)

    while waiting or at:
        for _ in range(min(crew.room(), len(waiting) + len(at)) - len(workers)):
            workers[crew.hire()] = False
        for worker in [w for w, there in workers.items() if there and w not in at][: len(waiting)]:
            at[worker] = waiting.popleft()
            crew.send(worker, task, at[worker])
        for event in crew.events():
            if event.kind == "there":
                workers[event.worker], lost = True, 0
            elif event.kind == "done" and event.report is not None and event.worker in at:
                Count.total += event.report.halved
                write(event.report.files)
                number = at[event.worker]
                if seen(number, is_there):
                    del at[event.worker]
                    advance(number)
                else:
                    again(event.worker, None)
            elif event.kind == "failed" and event.worker in at:
                again(event.worker, event.error)
            elif event.kind == "gone":
                workers.pop(event.worker, None)
                if event.worker in at:
                    again(event.worker, event.error)
                else:
                    lost += 1
                    if lost >= TRIES * max(1, crew.room()):
                        raise KeepsetError(f"Ray starts no worker: {first_line(event.error or Exception('it ended'))}")
        if at:
            said = time.monotonic()
        elif waiting and time.monotonic() - said > SAY_EVERY:
            log.warning("Ray has no worker yet: the cluster is busy, or has no GPU or core free")
            said = time.monotonic()


def seen(number: int, is_there: Callable[[int], bool]) -> bool:
    """Whether a shard can be seen here; files of other machines may take a while."""
    end = time.monotonic() + SEEN_WITHIN
    while not (there := is_there(number)) and time.monotonic() < end:
        time.sleep(0.2)
    return there


class Ray:
    """Executor on Ray's actors; see `Executor`."""

    here: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    def __init__(self, folder: Path, crew: RayCrew) -> None:
        """Take a run folder and a crew; nothing is started."""
        self.folder, self.crew = folder, crew
        self.workers: dict[Any, bool] = {}

    def run(
        self, task: Task, numbers: Sequence[int], *, is_there: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """See `Executor.run`.

        Raises:
            KeepsetError: as `hand_out`.
        """
        probe = self.folder / layout.PROBE
        write_atomic(probe, self.crew.word.encode())
        try:
            self.crew.begin(task)
            hand_out(self.crew, task, numbers, self.workers, is_there=is_there, advance=advance, write=self.write)
        finally:
            probe.unlink(missing_ok=True)

    def write(self, files: Files) -> None:
        """Put a worker's files into the run folder, those that mark others as whole last."""
        for name in sorted(files, key=lambda n: (n.endswith(".json"), n.endswith(layout.DONE), n)):
            place = (self.folder / name).resolve()
            if not place.is_relative_to(self.folder.resolve()):
                raise KeepsetError(f"{name}: a worker sent a file that leads out of the run folder")
            write_atomic(place, files[name])


NOW: dict[tuple[Any, ...], Ray] = {}
"""The executor that is at work in this process: one, as its workers hold the machines."""


def ray_executor(folder: Path, address: str | None, workers: int | None, gpus: bool, say: Callable[[str], None]) -> Ray:
    """The executor of one run folder; its workers stay until another folder's is asked for, or this process ends.

    Args:
        folder: the run folder.
        address: of a cluster; None: Ray is started on this machine.
        workers: how many; None: as many as there are GPUs, or cores.
        gpus: the model may run on a GPU.
        say: takes lines for the person at the terminal.

    Raises:
        KeepsetError: Ray isn't installed, or the cluster isn't there.
    """
    key = folder, address, workers, gpus
    if key not in NOW:
        for other in NOW.values():
            other.crew.dismiss(other.workers)
        NOW.clear()
        NOW[key] = Ray(folder, RayCrew(folder, address, workers, gpus, say))
    return NOW[key]


class RayCrew:
    """Actors of Ray."""

    def __init__(
        self, folder: Path, address: str | None, workers: int | None, gpus: bool, say: Callable[[str], None]
    ) -> None:
        """Connect to the cluster, or start one here; see `ray_executor`."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise KeepsetError("executor: ray isn't installed: pip install 'keepset[ray]', on every node") from None
        self.ray: Any = ray
        self.folder, self.say, self.most = folder.absolute(), say, workers
        own: dict[str, Any] = {"include_dashboard": False, "num_cpus": workers} if address is None else {}
        if not ray.is_initialized():
            try:
                ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)
            except Exception as error:
                raise KeepsetError(f"executor: no Ray at {address or 'this machine'}: {first_line(error)}") from None
        self.gpu = gpus and ray.cluster_resources().get("GPU", 0) > 0
        kind = "GPU" if self.gpu else "core"
        say(f"Ray at {address or 'this machine'}: {self.room()} workers, one a {kind}")
        self.word = os.urandom(16).hex()
        self.refs: dict[Any, Any] = {}  # what is awaited -> the actor
        self.blind: dict[Any, bool] = {}
        self.told: set[tuple[str, bool]] = set()
        self.stamp, self.brought = "", None

    def room(self) -> int:
        """How many workers the cluster has room for at present, other jobs not looked at."""
        there = int(self.ray.cluster_resources().get("GPU" if self.gpu else "CPU", 0))
        return there if self.most is None else min(there, self.most)

    def hire(self) -> Any:
        """Start an actor."""
        options = {"num_cpus": 1, "num_gpus": 1 if self.gpu else 0, "scheduling_strategy": "SPREAD"}
        actor = self.ray.remote(Worker).options(**options).remote()
        self.refs[actor.hello.remote(str(self.folder), self.word)] = actor
        return actor

    def dismiss(self, workers: dict[Any, bool]) -> None:
        """End all actors."""
        for worker in workers:
            self.ray.kill(worker)
        workers.clear()
        self.refs.clear()

    def begin(self, task: Task) -> None:
        """Put what a task reads where actors that don't see the run folder find it: into Ray's store."""
        self.stamp, self.brought = os.urandom(8).hex(), None
        self.reads = task.reads

    def send(self, worker: Any, task: Task, number: int) -> None:
        """Have an actor do a shard."""
        if not self.blind[worker]:
            ref = worker.do.remote(task, number)
        else:
            if self.brought is None:
                self.brought = self.ray.put(read_files(self.folder, self.reads))
            ref = worker.do_alone.remote(task, number, self.stamp, [self.brought])
        self.refs[ref] = worker

    def events(self) -> list[Event]:
        """What actors answered, within a second."""
        if not self.refs:
            time.sleep(LOOK_EVERY)
            return []
        answered, _ = self.ray.wait(list(self.refs), num_returns=len(self.refs), timeout=0)
        if not answered:
            answered, _ = self.ray.wait(list(self.refs), num_returns=1, timeout=LOOK_EVERY)
        return [self.answer(ref, self.refs.pop(ref)) for ref in answered]

    def answer(self, ref: Any, worker: Any) -> Event:
        """One actor's answer."""
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            return Event("failed", worker, error=cause)
        except self.ray.exceptions.RayError as error:
            return Event("gone", worker, error=error)
        if isinstance(answer, Report):
            return Event("done", worker, report=answer)
        host, shared = answer
        self.blind[worker] = not shared
        if (host, shared) not in self.told:
            self.told.add((host, shared))
            how = "sees the run folder and writes there" if shared else (
                "doesn't see the run folder: its results come back here, and are written here")  # fmt: skip
            self.say(f"Ray: {host} {how}")
        return Event("there", worker)


class Worker:
    """What runs in an actor."""

    def __init__(self) -> None:
        """Its own folder is made when it is needed."""
        self.own: tempfile.TemporaryDirectory[str] | None = None
        self.stamp, self.name = "", os.urandom(4).hex()

    def hello(self, folder: str, word: str) -> tuple[str, bool]:
        """The machine's name, and whether it sees the driver's run folder."""
        try:
            shared = (Path(folder) / layout.PROBE).read_text(encoding="utf-8") == word
        except OSError:
            shared = False
        return socket.gethostname(), shared

    def do(self, task: Task, number: int) -> Report:
        """Make a shard in the run folder."""
        share_folder(self.name)
        before = Count.total
        task([number])
        return Report(Count.total - before, {})

    def do_alone(self, task: Task, number: int, stamp: str, brought: list[Any]) -> Report:
        """Make a shard in a folder of this actor's own.

        Args:
            task: what makes it.
            number: its number.
            stamp: another one with every set of files that is brought.
            brought: the files in Ray's store, as a list of one.
        """
        import ray

        if self.own is None:
            self.own = tempfile.TemporaryDirectory(prefix="keepset-ray-")
        folder = Path(self.own.name)
        if stamp != self.stamp:
            for name, data in ray.get(brought[0]).items():
                write_atomic(folder / name, data)
            self.stamp = stamp
        before = states(folder)
        report = self.do(moved(task, folder), number)
        made = [name for name, state in states(folder).items() if before.get(name) != state]
        return replace(report, files=read_files(folder, made))


def moved(task: Task, folder: Path) -> Task:
    """The task on another run folder."""
    recipe = json.loads(task.argument.recipe)
    recipe["run_dir"] = str(folder)
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return replace(task, argument=replace(task.argument, recipe=text))


def states(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Time and size of every finished file under a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"]
    return {path.relative_to(folder).as_posix(): (s.st_mtime_ns, s.st_size) for path in files for s in [path.stat()]}


def read_files(folder: Path, names: Iterable[str]) -> Files:
    """The bytes of some files, and of all that lie in some folders."""
    files: Files = {}
    for name in names:
        place = folder / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files
