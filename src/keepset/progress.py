"""Progress that says what is done, how fast and how long it will take: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 20.0  # seconds between log lines where there is no terminal


@contextmanager
def track(console: Console, what: str, total: int, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Show progress over `total` units; yields `advance(n)`."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=False) as progress:
            task = progress.add_task(what, total=total)
            yield lambda n: progress.advance(task, n)
        return
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY and done < total:
            rate = done / (now - start)
            console.print(
                f"{what}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {(total - done) / rate:.0f} s left",
                soft_wrap=True,
            )
            last = now

    console.print(f"{what}: {total} {unit}")
    yield advance
    console.print(f"{what}: done in {time.monotonic() - start:.1f} s")
