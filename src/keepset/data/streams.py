"""Bytes in: opening a file or stdin, unpacking gzip and Zstandard under a size guard, and telling what it holds."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from keepset.data.reasons import FileRefused

MAX_ROW = 64 * 2**20
#: An archive is refused once it has given more than this many bytes and more than `BOMB_RATIO` times what was read.
BOMB_BYTES = 256 * 2**20
BOMB_RATIO = 250
_CHUNK = 2**20

_TOLD = {
    b"\x80\x02": "looks like a pickle, which keepset never reads",
    b"\x80\x03": "looks like a pickle, which keepset never reads",
    b"\x80\x04": "looks like a pickle, which keepset never reads",
    b"\x80\x05": "looks like a pickle, which keepset never reads",
    b"PK\x03\x04": "is a zip archive (or an Excel, NumPy or PyTorch file); unpack it first",
    b"BZh": "is bzip2; recompress it with gzip or zstd",
    b"\xfd7zXZ": "is xz; recompress it with gzip or zstd",
    b"\x93NUMPY": "is a NumPy array, not rows",
    b"GGUF": "is a GGUF model, not rows",
    b"SQLite format 3": "is an SQLite database; export the table as .csv or .jsonl",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


class StreamDamaged(Exception):
    """The compressed stream broke off or is corrupt; what was read before stands."""


class _Unpacked(io.RawIOBase):
    """A decompressor's output with a guard on the size; errors of the archive become `StreamDamaged`."""

    def __init__(self, name: str, packed: BinaryIO, unpacked: BinaryIO) -> None:
        self._name, self._packed, self._unpacked, self._given = name, packed, unpacked, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._unpacked.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            raise StreamDamaged(str(error) or type(error).__name__) from None
        self._given += len(data)
        if self._given > BOMB_BYTES and self._given > BOMB_RATIO * max(self._packed.tell(), 1):
            detail = f"unpacks to more than {BOMB_RATIO} times its size; unpack it yourself if you trust it"
            raise FileRefused(self._name, "archive-bomb", detail)
        buffer[: len(data)] = data
        return len(data)


class _Zstd:
    """Unpacks Zstandard frames; unlike the library's own reader it tells a frame that was cut short."""

    # an input block of 4 bytes can stand for 128 KiB: small sips keep what one call can give within 64 MiB
    _SIP = 2048

    def __init__(self, packed: io.BufferedReader) -> None:
        import zstandard

        self._packed, self._library = packed, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._fresh, self._rest = b"", True, b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            data = self._rest or self._packed.read(self._SIP)
            self._rest = b""
            if not data:
                if not self._fresh:
                    raise EOFError("the Zstandard stream ended before its end-of-frame mark")
                return b""
            try:
                self._ready = self._frame.decompress(data)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._fresh = False
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame, self._fresh = self._library.ZstdDecompressor().decompressobj(), True
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


class _Counting(io.RawIOBase):
    """Standard input has no `tell`; this counts."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._source.read(len(buffer))
        self._at += len(data)
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return self._at


def open_bytes(path: str) -> tuple[io.BufferedReader, str]:
    """Open a file (or `-`) and unpack it; what it is goes by its first bytes, not by its name.

    Returns:
        The stream, and the container: "parquet", "arrow" (not unpacked or read any further here), "csv" or "json".

    Raises:
        FileRefused: not there, unreadable, empty, UTF-16, a name that promises what the content isn't, or a container
            that is not read.
    """
    name = path if path != "-" else "<stdin>"
    try:
        # stdin is wrapped so that the compressed bytes taken from it can be counted
        raw: BinaryIO = cast(BinaryIO, _Counting(sys.stdin.buffer)) if path == "-" else open(path, "rb", buffering=0)
        stream: io.BufferedReader = io.BufferedReader(cast(io.RawIOBase, raw), _CHUNK)
        head = stream.peek(16)[:16]
    except FileNotFoundError:
        raise FileRefused(name, "no-such-file", "no such file") from None
    except OSError as error:
        raise FileRefused(name, "unreadable-file", f"can't be read: {error.strerror or error}") from None
    if not head:
        cause = "nothing came in (a run folder whose pool is `-` reads it anew at each step: name a file)"
        raise FileRefused(name, "empty-file", cause if path == "-" else "the file is empty")
    suffixes = [s.lower() for s in Path(path).suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    if head.startswith(b"PAR1"):
        return stream, "parquet"
    if head.startswith(b"ARROW1") or (head.startswith(b"\xff\xff\xff\xff") and last == ".arrow"):
        return stream, "arrow"
    packed = ""
    if head.startswith(b"\x1f\x8b"):
        packed, unpacked = "gzip", cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        packed, unpacked = "zstd", cast(BinaryIO, _Zstd(stream))
    if packed:
        stream = io.BufferedReader(cast(io.RawIOBase, _Unpacked(name, raw, unpacked)), _CHUNK)
        try:
            head = stream.peek(16)[:16]
        except StreamDamaged as error:
            raise FileRefused(name, f"not-{packed}", f"the {packed} stream is damaged: {error}") from None
        if not head:
            raise FileRefused(name, "empty-file", "the file is empty once unpacked")
        last = suffixes[0] if len(suffixes) == 2 else ""
    _refuse_foreign(name, head)
    jsonish = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b"")
    if not jsonish and last in (".gz", ".zst", ".parquet", ".arrow"):
        code = {".gz": "gzip", ".zst": "zstd"}.get(last, last[1:])
        raise FileRefused(name, f"not-{code}", f"the name ends in {last} but the content is neither that nor JSON")
    # without a name to go by, what is not JSON can only be CSV
    return stream, "csv" if last in (".csv", ".tsv") or (not last and not jsonish) else "json"


def _refuse_foreign(name: str, head: bytes) -> None:
    for magic, what in _TOLD.items():
        if head.startswith(magic):
            raise FileRefused(name, "unknown-container", f"the file {what}")
    if head.startswith(_UTF16) or (len(head) >= 4 and (head[1:4:2] == b"\0\0" or head[0:3:2] == b"\0\0")):
        what = "UTF-32" if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else "UTF-16"
        raise FileRefused(name, "utf-16", f"the text is {what}; convert it: iconv -f {what} -t UTF-8 OLD > NEW")


def skip_bom(stream: io.BufferedReader) -> None:
    """Step over a UTF-8 byte-order mark (or several: an empty file with one, put before another)."""
    while stream.peek(3)[:3] == b"\xef\xbb\xbf":
        stream.read(3)
