"""How a command ends when the machine, not the user, stops it: signals, full disks, memory that runs out.

SIGTERM (a scheduler's or `kill`'s word) and SIGINT (Ctrl-C) unwind the stack, so that locks and temporary files are let
go, and end with the exit codes 143 and 130 that shells and schedulers expect. What was finished before stays on disk.
"""

from __future__ import annotations

import errno
import signal
import threading
from typing import Any, NoReturn

GOES_ON = "the same command goes on where it was"
SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ENOMEM,
}  # fmt: skip
# How libraries that write through C++ or Rust tell the same; they raise RuntimeError or their own classes.
TOLD = ("No space left on device", "File too large", "Disk quota exceeded", "Read-only file system",
        "file write failed", "PytorchStreamWriter failed")  # fmt: skip
NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "std::bad_alloc")


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception: nothing that mends errors may catch it."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number."""
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + self.number


def stop_on_signals() -> None:
    """Let SIGTERM and SIGINT raise `Stopped`; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: Any) -> NoReturn:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        raise Stopped(number)

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, stop)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's on a GPU, or its allocator's on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def system_trouble(error: BaseException) -> str | None:
    """One line for an error that the machine caused (full disk, no rights, no memory); None for any other.

    Errors that libraries wrapped are looked for along the chain of causes.
    """
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return None
        if isinstance(seen, OSError) and seen.errno in SYSTEM:
            place = f"{seen.filename}: " if seen.filename else ""
            return f"{place}{seen.strerror}; free space or choose another --run_dir: {GOES_ON}"
        if out_of_memory(seen):
            return f"out of memory; lower batching.token_budget or per_device_train_batch_size: {GOES_ON}"
        text = next((t for t in TOLD if t in str(seen)), None)
        if text is not None and isinstance(seen, Exception):
            return f"a file can't be written ({text}); free space or choose another --run_dir: {GOES_ON}"
        seen = seen.__cause__ or seen.__context__
    return None
