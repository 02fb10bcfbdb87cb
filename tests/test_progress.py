"""The live view: a bar on a terminal, few lines in a file, and what is ahead at the beginning of a stage."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from keepset import progress
from keepset.progress import UNDER_WAY, clock, looking_ahead, track


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_file_gets_a_line_at_the_beginning_and_the_end_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, now = Console(file=io.StringIO(), width=60), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with (
        looking_ahead(lambda: "2 of 9 steps done; next: score davir"),
        track(console, "losses", 1000, there=100) as advance,
    ):
        assert UNDER_WAY[-1].what == "losses"
        for _ in range(90):
            now[0] += 1.0
            advance(10)
    assert UNDER_WAY == []
    assert lines_of(console) == [
        "losses: 1000 rows, 100 of them done before (2 of 9 steps done; next: score davir)",
        "losses: 400/1000 rows, 10 rows/s, 1:00 left",
        "losses: 700/1000 rows, 10 rows/s, 0:30 left",
        "losses: done in 90.0 s",
    ]


def test_a_terminal_gets_what_is_ahead_and_a_bar_with_the_speed() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    what = "gradients at checkpoint-6 (adam)"
    with looking_ahead(lambda: "next: [davir]"), track(console, what, 117, "rows") as advance:
        advance(64)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "next: [davir]" in text and what in text and "64/117 rows, " in text and "rows/s" in text
    assert "…" not in text, "80 columns are enough"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with track(console, "losses", 4) as advance:
        advance(4)
    assert lines_of(console)[0] == "losses: 4 rows" and "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_error_inside_goes_on_and_leaves_nothing_under_way() -> None:
    for terminal in (True, False):
        with pytest.raises(ValueError, match="x"), track(Console(file=io.StringIO(), force_terminal=terminal), "a", 1):
            raise ValueError("x")
    assert UNDER_WAY == []


def test_a_hundred_thousand_advances_cost_less_than_a_second() -> None:
    start = time.perf_counter()
    with track(Console(file=io.StringIO()), "losses", 100_000) as advance:
        for _ in range(100_000):
            advance(1)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (3723, "1:02:03"), (-3, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
