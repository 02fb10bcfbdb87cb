"""Several processes on one run folder that know nothing of one another: each shard once, none lost with a dead one."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import pytest

from keepset.runfolder.claims import Busy, Claims
from keepset.runfolder.execute import Shared, Task

NUMBERS = range(12)


def make(folder, numbers):
    for number in numbers:
        with (folder / "made").open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        time.sleep(0.02)
        (folder / f"shard-{number}").touch()


def take_part(folder, begin=0.0, wait=True, task=make):
    claims, seen = Claims(folder / "claims", 1.0, begin), []
    Shared(claims, wait).run(
        Task(task, folder, "s"), list(NUMBERS), is_there=lambda n: (folder / f"shard-{n}").exists(), advance=seen.append
    )
    return seen


def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def made(folder):
    return [line.split() for line in (folder / "made").read_text().splitlines()]


def test_each_shard_is_made_once_and_seen_by_all(tmp_path):
    pids = [fork(lambda k=k: take_part(tmp_path, k / 3)) for k in (1, 2)]
    assert sorted(take_part(tmp_path)) == list(NUMBERS)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert sorted(int(n) for n, _ in made(tmp_path)) == list(NUMBERS) and len({pid for _, pid in made(tmp_path)}) == 3
    assert not list((tmp_path / "claims").iterdir())


def test_a_killed_worker_s_shard_is_taken_over(tmp_path):
    def fatal(folder, numbers):
        (folder / "begun").touch()
        time.sleep(30)

    pid = fork(lambda: take_part(tmp_path, task=fatal))
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    with pytest.raises(Busy):  # all but the one that the other is at
        take_part(tmp_path, wait=False)
    assert sorted(int(n) for n, _ in made(tmp_path)) == list(NUMBERS)[1:]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert sorted(take_part(tmp_path)) == list(NUMBERS)
    assert Counter(int(n) for n, _ in made(tmp_path)) == dict.fromkeys(NUMBERS, 1)


def test_an_error_lets_the_claim_go(tmp_path):
    def bad(folder, numbers):
        raise ValueError("row 20")

    with pytest.raises(ValueError, match="row 20"):
        take_part(tmp_path, task=bad)
    assert not list((tmp_path / "claims").iterdir()) and sorted(take_part(tmp_path)) == list(NUMBERS)
