"""Files that are whole or not there, and fingerprints of values and files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from keepset.errors import KeepsetError

PART = ".part"
"""How a file is called while it is written; a process that shares the folder with others makes it its own."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text that fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON for other programs: NaN and infinities, which JSON has no word for, are null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
    """sha256 (hex) of bytes, or of a value's canonical JSON."""
    data = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(data).hexdigest()


def canonical_list(values: Iterable[Any]) -> Iterator[bytes]:
    """The canonical JSON of a list of values, in pieces: the list itself is never in memory."""
    source, comma = iter(values), b""
    yield b"["
    while block := list(islice(source, 1 << 14)):
        yield comma + canonical(block)[1:-1].encode()
        comma = b","
    yield b"]"


def digest_list(values: Iterable[Any]) -> str:
    """What `digest` gives for the list of the values."""
    whole = hashlib.sha256()
    for piece in canonical_list(values):
        whole.update(piece)
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(
    path: Path, data: bytes | Callable[[IO[bytes]], Any], before: Callable[[Path], Any] | None = None
) -> None:
    """Write a file so that it is either the old one or wholly the new one, also after a power cut.

    Args:
        path: the file.
        data: its bytes, or what writes them into the file that it is given.
        before: called with the finished file before it takes its name.

    Raises:
        KeepsetError: the disk is full, or the folder can't be written.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # left by other hands: opening it would write where it leads
            part.unlink()
        with part.open("wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(part)
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise KeepsetError(
            f"{path}: can't be written: {error.strerror}; free space, or write to another folder"
        ) from None


def share_folder(owner: str) -> None:
    """Let this process write beside others: two may write the same file, which is then whole from one of them."""
    global PART
    PART = f".{owner}.part"


def misfits(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Those of the recorded files that are missing or don't have their checksum."""
    return [n for n, sha in files.items() if not (folder / n).is_file() or file_digest(folder / n) != sha]
