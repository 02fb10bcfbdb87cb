"""Who computes the shards that are missing: this process, forks of it, or others beside it. The bytes are the same.

An executor is handed a task and shard numbers and nothing else. A task is a function of a module with an argument that
can be pickled, so that any process on any machine that sees the run folder can do it; a committed shard is the mark
that its work is done. Forks inherit what this process has loaded: the model is loaded once and shared. They write
finished shards and nothing else, so whatever happens to one, the others' work and its own finished shards count; what
it lacked is computed by the parent. CPU only: a CUDA context doesn't survive a fork.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from keepset.memory import Count
from keepset.runfolder.claims import LOOK_EVERY as LOOK_AT_OTHERS
from keepset.runfolder.claims import Busy, Claims

log = logging.getLogger(__name__)

LOOK_EVERY = 0.1  # seconds between looks at the workers
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2), Linux


@dataclass(frozen=True)
class Task:
    """A function of a module, and what it works on; both can be pickled. It commits the shards of the given numbers.

    A shard is any numbered piece of work whose result stays in the run folder: rows of a pass, or a whole training.

    Attributes:
        function: takes the argument and numbers.
        argument: what it works on; where the run folder isn't shared, a dataclass whose `recipe` is JSON.
        name: what pieces are claimed by; equal in every process that does this task.
        reads: what of the run folder it reads: files and folders.
    """

    function: Callable[[Any, Sequence[int]], None]
    argument: Any
    name: str = ""
    reads: tuple[str, ...] = ()

    def __call__(self, numbers: Sequence[int]) -> None:
        """Do these shards."""
        self.function(self.argument, numbers)


class Executor(Protocol):
    """Whoever has shards computed.

    Attributes:
        here: it computes in this process or in forks of it, which take over what this one has loaded.
        trains: independent trainings are tasks for it, too.
    """

    here: ClassVar[bool]
    trains: ClassVar[bool]

    def run(
        self, task: Task, numbers: Sequence[int], *, is_there: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """Have the shards made; returns when nobody works on them any more, however it ended.

        Args:
            task: what makes them.
            numbers: the shards that are missing.
            is_there: whether a shard is committed.
            advance: called with the number of every shard that is seen to be committed.
        """


class Here:
    """This process, one shard after the other."""

    here: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def run(
        self, task: Task, numbers: Sequence[int], *, is_there: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """See `Executor.run`; an error goes to the caller."""
        for number in numbers:
            task([number])
            advance(number)


@dataclass(frozen=True)
class Forks:
    """Forks of this process, after the first shard: whatever a task prepares once is there before they start."""

    workers: int
    here: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    def run(
        self, task: Task, numbers: Sequence[int], *, is_there: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """See `Executor.run`; what a fork that failed left undone is done here."""
        Here().run(task, numbers[:1], is_there=is_there, advance=advance)
        share_out(numbers[1:], task, self.workers, is_there=is_there, advance=advance)
        Here().run(task, [n for n in numbers[1:] if not is_there(n)], is_there=is_there, advance=advance)


@dataclass(frozen=True)
class Shared:
    """This process beside others that work on the same run folder (`keepset work`): each claims what it does.

    Attributes:
        claims: this process's.
        wait: stay until others have done what they claimed; else go, so that the caller finds other work.
    """

    claims: Claims
    wait: bool = True
    here: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def run(
        self, task: Task, numbers: Sequence[int], *, is_there: Callable[[int], bool], advance: Callable[[int], None]
    ) -> None:
        """See `Executor.run`.

        Raises:
            Busy: nothing is left but what others are at, and `wait` is False.
        """
        first = int(self.claims.begin * len(numbers))
        waiting = [*numbers[first:], *numbers[:first]]
        while waiting:
            before = len(waiting)
            for number in list(waiting):
                claim = f"{task.name}-{number}"
                if not is_there(number):
                    if not self.claims.take(claim):
                        continue
                    try:
                        if not is_there(number):
                            task([number])
                    finally:
                        self.claims.release(claim)
                waiting.remove(number)
                advance(number)
            if len(waiting) == before:
                if not self.wait:
                    raise Busy(task.name)
                time.sleep(LOOK_AT_OTHERS)


def share_out(
    shards: Sequence[int],
    make: Callable[[Sequence[int]], None],
    workers: int,
    *,
    is_there: Callable[[int], bool],
    advance: Callable[[int], None],
) -> None:
    """Let forks of this process make shards; returns when all of them have ended, however they did.

    Worker k makes every `workers`-th shard, from the k-th on; for the rest see `Executor.run`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    running = dict(start(shards[k::workers], make) for k in range(min(workers, len(shards))))
    waiting = list(shards)

    def look() -> None:
        for shard in [s for s in waiting if is_there(s)]:
            waiting.remove(shard)
            advance(shard)

    try:
        while running:
            time.sleep(LOOK_EVERY)
            look()
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with os.fdopen(running.pop(pid)) as report:
                        Count.total += int(report.read() or 0)
                    if status:
                        log.warning("a worker %s; what it lacked is computed here", how_it_ended(status))
        look()
    finally:  # after an error or a signal here no fork goes on
        for pid, report_fd in running.items():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(report_fd)


def start(shards: Sequence[int], make: Callable[[Sequence[int]], None]) -> tuple[int, int]:
    """Fork a worker for some shards; its process id, and where it writes how many batches it halved."""
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        alone(parent)
        before = Count.total
        make(shards)
        os.write(writing, str(Count.total - before).encode())
        code = 0
    except Exception as error:
        log.warning("a worker met %s: %s", type(error).__name__, str(error).split("\n")[0][:300])
    finally:
        os._exit(code)  # no clean-up of what is the parent's


def alone(parent: int) -> None:
    """Make a fork fit to compute: one thread, as thread pools don't survive a fork, and no life without the parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def how_it_ended(status: int) -> str:
    """Words for a status of `waitpid`."""
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with an error (exit code {os.waitstatus_to_exitcode(status)})"
