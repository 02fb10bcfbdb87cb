"""Progress that says what is done, how fast, how long it will take and what is next.

On a terminal a bar that stays when it is full, so that what is done stands above what is under way; elsewhere log
lines: one when a stage begins, one when it ends, one every `LINE_EVERY` seconds between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY = 30.0  # seconds between log lines where there is no terminal
UNDER_WAY: list[Tracked] = []
"""What this process is at, the innermost last; `costs.Meter` leaves it in the run folder for `keepset status`."""
OUTLOOK: list[Callable[[], str]] = []
"""Says what is done, what is next and what was spent; the last one counts."""


@dataclass
class Tracked:
    """Work of `total` units, of which `there` had been done before it was begun."""

    what: str
    total: int
    unit: str
    there: int = 0
    done: int = 0
    start: float = field(default_factory=lambda: time.monotonic())

    @property
    def rate(self) -> float:
        """Units a second since it began; 0 before the first."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def speed(self) -> str:
        """`2.5 rows/s, 0:42 left`; nothing before the first unit is done."""
        if not self.done:
            return ""
        left = (self.total - self.there - self.done) / self.rate
        return f"{self.rate:.3g} {self.unit}/s" + (f", {clock(left)} left" if left > 0 else "")


def clock(seconds: float) -> str:
    """`0:42`, `1:02:03`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def looking_ahead(outlook: Callable[[], str]) -> Iterator[None]:
    """Have every stage inside say what `outlook` gives when it begins."""
    OUTLOOK.append(outlook)
    try:
        yield
    finally:
        OUTLOOK.remove(outlook)


@contextmanager
def track(
    console: Console, what: str, total: int, unit: str = "rows", there: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` units, of which some are `there` already; yields `advance(n)`."""
    work = Tracked(what, total, unit, there)
    UNDER_WAY.append(work)
    ahead = OUTLOOK[-1]() if OUTLOOK else ""
    try:
        yield from (bar if console.is_terminal and not console.is_dumb_terminal else lines)(console, work, ahead)
    finally:
        UNDER_WAY.remove(work)


def bar(console: Console, work: Tracked, ahead: str) -> Iterator[Callable[[int], None]]:
    """What is ahead, and a bar."""

    def far() -> str:
        done = f"{work.there + work.done}/{work.total} {work.unit}"
        return f"{done}, {work.speed()}" if work.done else done

    columns = TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[far]}")
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(work.what, total=work.total, completed=work.there, far=far())
        if ahead:
            progress.console.print(ahead, style="dim", highlight=False, markup=False, soft_wrap=True)

        def advance(n: int) -> None:
            work.done += n
            progress.update(task, advance=n, far=far())

        yield advance


def lines(console: Console, work: Tracked, ahead: str) -> Iterator[Callable[[int], None]]:
    """Log lines."""
    last = work.start

    def say(text: str) -> None:
        console.print(f"{work.what}: {text}", soft_wrap=True, markup=False, highlight=False)

    def advance(n: int) -> None:
        nonlocal last
        work.done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY and work.there + work.done < work.total:
            last = now
            say(f"{work.there + work.done}/{work.total} {work.unit}, {work.speed()}")

    before = f", {work.there} of them done before" if work.there else ""
    say(f"{work.total} {work.unit}{before}" + (f" ({ahead})" if ahead else ""))
    yield advance
    say(f"done in {time.monotonic() - work.start:.1f} s")
