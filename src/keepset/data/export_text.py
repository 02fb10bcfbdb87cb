"""Rows out as text files: JSON Lines, JSON, CSV and TSV, also compressed; what JSON can't hold is changed and said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

log = logging.getLogger(__name__)


#: What a text must hold to hold a number that JSON, or readers of it, have no word for.
_DOUBTFUL = re.compile(r"NaN|Infinity|\d{19}")


class Lost:
    """Makes rows of Parquet valid JSON that every reader reads alike, and counts what that changes."""

    def __init__(self) -> None:
        self.nulls: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()

    def text(self, text: str) -> str:
        """Return the row's own text, or, where a number needs it, the row written anew."""
        if not _DOUBTFUL.search(text):
            return text
        row = json.loads(text)
        said = {name: self.value(value, name) for name, value in row.items()}
        return text if said == row else json.dumps(said, ensure_ascii=False, allow_nan=False)

    def value(self, value: Any, column: str) -> Any:
        """Return a value with null for NaN and infinity, and text for an integer beyond signed 64 bits."""
        if isinstance(value, float) and not math.isfinite(value):
            self.nulls[column] += 1
            return None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self.texts[column] += 1
            return str(value)
        if isinstance(value, list):
            return [self.value(v, column) for v in value]
        return {k: self.value(v, column) for k, v in value.items()} if isinstance(value, dict) else value

    def say(self, path: str | Path) -> None:
        """Print what was changed, by column."""
        for counts, change in (
            (self.nulls, "NaN or infinite, which JSON has no word for: written as null"),
            (self.texts, "beyond signed 64 bits, which JSON readers change: written as text"),
        ):
            if counts:
                columns = ", ".join(f"'{name}' {n}" for name, n in counts.items())
                log.warning("%s: values of %s are %s (.parquet keeps them)", path, columns, change)


@contextmanager
def opened(part: Path, path: Path) -> Iterator[Any]:
    """Open `part` for writing, compressed by the suffix of `path`.

    A .gz carries no name or time, so that the same rows give the same bytes.
    """
    suffix = path.suffix.lower()
    with open(part, "wb") as plain:
        if suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as out:
                yield out
        elif suffix == ".zst":
            import zstandard

            with zstandard.ZstdCompressor(level=10).stream_writer(plain, closefd=False) as packed:
                yield packed
        else:
            yield plain


def _write_jsonl(texts: Iterable[str], out: Any, lost: Lost) -> None:
    for text in texts:
        out.write(lost.text(text).encode("utf-8") + b"\n")


def _write_json(texts: Iterable[str], out: Any, lost: Lost) -> None:
    out.write(b"[")
    for k, text in enumerate(texts):
        out.write((b",\n" if k else b"\n") + lost.text(text).encode("utf-8"))
    out.write(b"\n]\n")


def _write_csv(texts: Iterable[str], out: Any, lost: Lost, delimiter: str = ",") -> None:
    rows = [json.loads(text) for text in texts]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    # before Python 3.13 a CR is quoted only where it belongs to the line's end
    lines = SimpleNamespace(write=lambda line: buffer.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(lines, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name), name, lost) for name in names])
        if buffer.tell() > 2**20:
            out.write(buffer.getvalue().encode("utf-8"))
            buffer.seek(0)
            buffer.truncate()
    out.write(buffer.getvalue().encode("utf-8"))


def _write_tsv(texts: Iterable[str], out: Any, lost: Lost) -> None:
    _write_csv(texts, out, lost, "\t")


WRITERS: dict[str, Callable[[Iterable[str], Any, Lost], None]] = {
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "tsv": _write_tsv,
}


def _cell(value: Any, column: str, lost: Lost) -> str:
    if value is None:
        return ""
    if isinstance(value, (dict, list)):  # the cell is read as JSON again
        value = lost.value(value, column)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
