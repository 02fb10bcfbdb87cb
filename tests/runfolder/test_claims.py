"""Claims: one process alone has a piece of work, a dead one's is taken over, a living one's never."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from keepset.runfolder.claims import Busy, Claims, alive

PATIENCE = 0.6


def test_of_many_one_alone_gets_it(tmp_path):
    everybody = [Claims(tmp_path) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for name in ("models/warmup", "s-3", "s-4"):
            assert sum(pool.map(lambda c, name=name: c.take(name), everybody)) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_who_lets_go_leaves_nothing_and_another_gets_it(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take("a") and not other.take("a")
    one.release("a")
    assert not list(tmp_path.iterdir()) and other.take("a") and not one.take("a")


def test_a_living_owner_keeps_it_for_longer_than_the_patience(tmp_path):
    one, other = Claims(tmp_path, PATIENCE), Claims(tmp_path, PATIENCE)
    assert one.take("a")
    end = time.monotonic() + 4 * PATIENCE
    while time.monotonic() < end:
        assert not other.take("a")
        time.sleep(PATIENCE / 10)
    assert alive(tmp_path, PATIENCE)


def test_a_dead_owner_s_work_is_taken_over_by_one(tmp_path):
    (tmp_path / "a.0").write_text("somebody")  # whom nobody touches
    os.utime(tmp_path / "a.0", (0, 0))  # a clock of long ago, or of a server that goes wrong, says nothing
    others = [Claims(tmp_path, PATIENCE) for _ in range(8)]
    assert not any(c.take("a") for c in others)
    assert not alive(tmp_path, PATIENCE / 3)
    time.sleep(1.5 * PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        won = [c for c, got in zip(others, pool.map(lambda c: c.take("a"), others), strict=True) if got]
    assert len(won) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["a.0", "a.1"]
    won[0].release("a")
    assert not list(tmp_path.iterdir())


def test_who_waits_gets_it_and_who_does_not_is_told(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    with one.holding("a", wait=True), pytest.raises(Busy), other.holding("a", wait=False):
        pass
    with pytest.raises(ValueError), other.holding("a", wait=True):
        raise ValueError
    assert one.take("a")


def test_an_owner_that_stood_still_and_was_overtaken_ends_itself_where_two_would_spoil_the_work(tmp_path):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        Claims(tmp_path, PATIENCE).take("training", fatal=True)
        time.sleep(30)
        os._exit(0)
    while not (tmp_path / "training.0").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    other = Claims(tmp_path, PATIENCE)
    end = time.monotonic() + 20
    while not other.take("training") and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "training.1").exists()
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert "training" in other.held
