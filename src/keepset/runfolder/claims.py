"""Claims on work in a shared folder: one process alone does each piece, without a server and without locks.

A claim is a file made with O_CREAT | O_EXCL, which one process alone can make, on NFS too. Its owner touches it every
few seconds. Whoever sees for `patience` seconds of its own clock that the file's time stays the same takes the owner
for dead and makes the file's next generation (`<name>.1` after `<name>.0`), again with O_EXCL: one process alone wins,
and clocks of two machines are never compared. A file is opened before its time is read, as NFS asks the server then.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE = 90.0  # seconds
BEATS = 12  # touches within the patience
LOOK_EVERY = 0.5  # seconds between looks at what others do


class Busy(Exception):
    """What is asked for is being made by another process."""


class Claims:
    """The claims of one process in one folder."""

    def __init__(self, folder: Path, patience: float = PATIENCE, begin: float = 0.0) -> None:
        """Nothing is written before `take`.

        Args:
            folder: where the claims lie.
            patience: seconds without a sign of life after which an owner counts as dead.
            begin: from 0 to below 1: where in a list of work this process begins to look, so that few meet.
        """
        self.folder, self.patience, self.begin = folder, patience, begin
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self.held: dict[str, Path] = {}
        self.fatal: set[str] = set()
        self.seen: dict[str, tuple[str, int, float]] = {}
        self.guard = threading.Lock()
        self.beating: threading.Thread | None = None

    def take(self, name: str, *, fatal: bool = False) -> bool:
        """Claim a piece of work, unless a living process has it.

        Args:
            name: the work's; letters that a file name can't have are replaced.
            fatal: two processes at it would spoil it: this process ends itself where it is found to have been taken
                for dead.
        """
        name = file_name(name)
        newest = self.newest(name)
        if newest is not None and not self.is_stale(name, newest):
            return False
        path = self.folder / f"{name}.{0 if newest is None else generation(newest) + 1}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, self.owner.encode())
        finally:
            os.close(file)
        if newest is not None:
            log.warning("%s: its worker gave no sign of life for %g s; taken over", name, self.patience)
        with self.guard:
            self.held[name] = path
            if fatal:
                self.fatal.add(name)
        if self.beating is None:
            self.beating = threading.Thread(target=self.beat, daemon=True)
            self.beating.start()
        return True

    def release(self, name: str) -> None:
        """Let go of a claim, and of those that died with it."""
        name = file_name(name)
        with self.guard:
            path = self.held.pop(name, None)
            self.fatal.discard(name)
        if path is not None:
            for k in range(generation(path) + 1):  # the newest last: until then it is claimed
                self.folder.joinpath(f"{name}.{k}").unlink(missing_ok=True)

    @contextmanager
    def holding(self, name: str, *, wait: bool, fatal: bool = False) -> Iterator[None]:
        """Hold a claim while the context lasts; wait for it.

        Raises:
            Busy: `wait` is False, and another process has it.
        """
        while not self.take(name, fatal=fatal):
            if not wait:
                raise Busy(name)
            time.sleep(LOOK_EVERY)
        try:
            yield
        finally:
            self.release(name)

    def newest(self, name: str) -> Path | None:
        """The claim's last generation; None where there is none."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return None
        mine = [self.folder / n for n in names if n.rpartition(".")[0] == name]
        return max(mine, key=generation, default=None)

    def is_stale(self, name: str, path: Path) -> bool:
        """Whether a claim's time stayed the same for as long as this process has patience."""
        touched = last_touched(path)
        if touched is None:  # it was let go just now: the next look sees
            return False
        now = time.monotonic()
        before = self.seen.get(name)
        if before is None or before[:2] != (path.name, touched):
            self.seen[name] = (path.name, touched, now)
            return False
        return now - before[2] > self.patience

    def beat(self) -> None:
        """Touch what is held, for ever; end the process where it lost what two may not do."""
        while True:
            time.sleep(self.patience / BEATS)
            with self.guard:
                held, fatal = dict(self.held), set(self.fatal)
            for name, path in held.items():
                with suppress(OSError):
                    os.utime(path)
                overtaken = self.folder / f"{name}.{generation(path) + 1}"
                if name in fatal and name in self.held and overtaken.exists():
                    log.warning("%s: taken over by another worker while this one stood still; it ends here", name)
                    os.kill(os.getpid(), signal.SIGTERM)


def file_name(name: str) -> str:
    """A claim's name without what a file name can't hold."""
    return "".join(c if c.isalnum() or c in "-_@+%" else "+" for c in name)


def generation(path: Path) -> int:
    """A claim's generation, from 0 on; -1 of a file that is none."""
    number = path.name.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def last_touched(path: Path) -> int | None:
    """A file's time in nanoseconds, as the server has it; None where it is gone."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(file).st_mtime_ns
    finally:
        os.close(file)


def alive(folder: Path, seconds: float = 1.5 * PATIENCE / BEATS) -> bool:
    """Whether somebody touches a claim of the folder within some seconds; at once False where there is none."""
    paths = [path for path in folder.glob("*") if generation(path) >= 0]
    before = {path: last_touched(path) for path in paths}
    end = time.monotonic() + seconds
    while paths and time.monotonic() < end:
        time.sleep(min(LOOK_EVERY, seconds / 4))
        if any((now := last_touched(path)) is not None and now != before[path] for path in paths):
            return True
    return False
