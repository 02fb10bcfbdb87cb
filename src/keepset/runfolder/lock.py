"""Who holds a run folder: one process, or those of `keepset work`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keepset.errors import KeepsetError
from keepset.runfolder import layout
from keepset.runfolder.claims import alive


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made, for this process.

    Raises:
        KeepsetError: another process works in it, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / layout.LOCK).open("a")
    except OSError as error:
        raise KeepsetError(f"{folder}: can't be written: {error.strerror}; choose another --run_dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KeepsetError(f"{folder}: another keepset process works in this folder; wait for it") from None
        if alive(folder / layout.CLAIMS_FOLDER):
            raise KeepsetError(f"{folder}: `keepset work` is at it; wait for its processes, or start one more")
        yield


def is_free(folder: Path) -> bool:
    """Whether no process without claims holds a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / layout.LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def refuse_links(folder: Path) -> None:
    """Refuse links in a run folder that lead out of it: a folder from elsewhere must not decide where is written.

    Raises:
        KeepsetError: there is one; the message names it.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            link = os.path.join(place, name)
            if os.path.islink(link) and not os.path.realpath(link).startswith(root + os.sep):
                raise KeepsetError(f"{link}: a link that leads out of the run folder; remove it (link the folder)")
