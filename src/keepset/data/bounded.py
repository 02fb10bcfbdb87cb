"""Run pieces of other people's programs (chat templates) within a time and an amount of memory."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TICK = 0.25  # seconds between looks at the clock


class TookTooLong(Exception):
    """The time is up."""


class Bounds:
    """A time for each piece of work, and an amount of memory for what the process allocates meanwhile.

    `with bounds.watched():` around many pieces sets the limits up, which is too slow to do for each; `with
    bounds.piece():` around each one. Work that is longer ends with `TookTooLong`, larger work with `MemoryError`.

    The time is the wall clock's, kept by SIGALRM: that ends endless loops, and C code that looks for signals (large
    integers, regular expressions). Memory is RLIMIT_DATA, where /proc tells what the process has. Python takes signals
    in the main thread only: in others there are no limits.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        """Keep the limits: seconds a piece, and bytes."""
        self.seconds, self.memory = seconds, memory
        self.watching = False
        self.since: float | None = None  # when the present piece began
        self.grown = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the pieces of work inside; calls may be nested."""
        if self.watching or threading.current_thread() is not threading.main_thread():
            yield
            return
        limits = resource.getrlimit(resource.RLIMIT_DATA)
        start, handler = time.monotonic(), signal.signal(signal.SIGALRM, self.look)
        self.watching = True
        left, interval = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            self.limit_memory()
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:  # somebody else's alarm, which waited
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.001), interval)
            resource.setrlimit(resource.RLIMIT_DATA, limits)
            self.watching = False

    @contextmanager
    def piece(self) -> Iterator[None]:
        """One piece of work."""
        if self.grown and self.watching:  # what was kept of earlier pieces is no offence
            self.limit_memory()
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def look(self, number: int, frame: FrameType | None) -> None:
        """End the present piece if its time is up; called at every tick."""
        self.grown = True
        if self.since is not None and time.monotonic() - self.since > self.seconds:
            # and again at the next tick, should somebody (Jinja's constant folding) have caught it
            raise TookTooLong(f"stopped after {self.seconds:g} s")

    def limit_memory(self) -> None:
        """Allow `memory` bytes on top of what the process has now."""
        self.grown = False
        held, hard = data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)[1]
        if held is not None:
            limit = held + self.memory
            resource.setrlimit(
                resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
            )


def data_bytes() -> int | None:
    """What this process has allocated, as RLIMIT_DATA counts it; None where the system doesn't tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None
