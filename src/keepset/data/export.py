"""Rows out: a subset in the input's own dialect and container or in another one, and Parquet that loads anywhere."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keepset.data.originals import original_rows
from keepset.data.pool import Message, Pool
from keepset.errors import DataError

log = logging.getLogger(__name__)

CONTAINERS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


_FOREIGN = (".arrow", ".feather", ".xlsx", ".xls", ".bz2", ".xz", ".zip", ".7z", ".pkl", ".npy", ".orc", ".avro", ".db")


def write_subset(pool: Pool, indices: Sequence[int] | np.ndarray, path: str | Path, to: str | None = None) -> None:
    """Write chosen rows, in the order given, with nothing added to them.

    The container goes by `to` if that is one, else by the path's suffix (.gz and .zst compress), else by the input's.
    The dialect is the rows' own; rows of a pool that mixes dialects are written as `messages`. The file appears whole
    or not at all.

    Args:
        pool: the pool.
        indices: (k,) row numbers.
        path: where to write.
        to: jsonl, json, csv, parquet, messages, alpaca, sharegpt or prompt-completion; default: as it came.

    Raises:
        DataError: `to` is unknown, the path's suffix promises another container, the rows can't be said in that
            dialect, or the file can't be written.
    """
    path = Path(path)
    chosen = pool.take(indices)
    if to is not None and to not in DIALECTS and to not in CONTAINERS.values():
        raise DataError(f"to '{to}' is not known; known: {', '.join([*dict.fromkeys(CONTAINERS.values()), *DIALECTS])}")
    named = container_of(path)
    container = to if to is not None and to not in DIALECTS else named or _own_container(chosen)
    packed = path.suffix.lower() in (".gz", ".zst")
    if named not in (None, container) or path.suffix.lower() in _FOREIGN or (container == "parquet" and packed):
        raise DataError(f"{path}: the name is none of a {container} file: name it .{container}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # opening it would write where it leads
            part.unlink()
        if container == "parquet":
            table = rows_table(_texts(chosen, to)) if to in DIALECTS else pool_table(chosen)
            try:
                pq.write_table(table, part)
            except pa.ArrowException as error:
                raise DataError(f"{path}: Parquet can't hold it: {str(error).splitlines()[0]}; write .jsonl") from None
        else:
            dialect = to if to in DIALECTS else _common_dialect(chosen)
            lost = _Lost()
            with _packed(part, path) as out:
                _WRITERS[container](_texts(chosen, dialect), out, lost)
            lost.say(path)
            if dialect is None:
                _say_bytes(chosen, path)
        with open(part, "rb+") as done:
            os.fsync(done.fileno())
        os.replace(part, path)
    except (OSError, DataError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: can't be written: {error.strerror or error}") from None


def container_of(path: Path) -> str | None:
    """Return the container a file name's suffix stands for, or None."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return CONTAINERS.get(suffixes[-1]) if suffixes else None


def row_texts(pool: Pool, to: str | None = None) -> list[str]:
    """Return each row as JSON text: its own, or rewritten in another dialect (a mixed pool: as `messages`).

    Raises:
        DataError: a row can't be said in that dialect; the message names it.
    """
    return _texts(pool, to or _common_dialect(pool))


def _texts(pool: Pool, to: str | None) -> list[str]:
    if to is None:
        found: list[str] = pool.table["raw"].to_pylist()
        return found
    write = DIALECTS[to]
    texts = []
    for k, messages in enumerate(pool.all_messages()):
        try:
            texts.append(json.dumps(write(messages), ensure_ascii=False))
        except ValueError as error:
            place = f"{pool.table['file'][k].as_py()}:{pool.table['line'][k].as_py()}"
            raise DataError(f"{place}: can't be written as {to}: {error}") from None
    return texts


def _common_dialect(pool: Pool) -> str | None:
    """Return `messages` for rows that mix dialects; None where each row is written as it came."""
    used = set(pool.table["file"].unique().to_pylist())
    dialects = {info.dialect for info in pool.files if info.file in used}
    if len(dialects) > 1 and "text" in dialects:
        log.warning("the subset mixes plain text with chats (%s): each row is written as it came", sorted(dialects))
    elif len(dialects) > 1:
        log.info("the subset mixes dialects (%s): it is written as messages", ", ".join(sorted(dialects)))
        return "messages"
    return None


# ------------------------------------------------------------------------------------------------------- dialects


def _chat(messages: list[Message]) -> list[Message]:
    if messages[0]["role"] == "text":
        raise ValueError("the row is plain text, not a chat")
    return messages


def _as_messages(messages: list[Message]) -> dict[str, Any]:
    return {"messages": _chat(messages)}


_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _as_sharegpt(messages: list[Message]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": _SHAREGPT[m["role"]], "value": m["content"]} | ({"train": False} if "train" in m else {})
            for m in _chat(messages)
        ]
    }


def _as_prompt_completion(messages: list[Message]) -> dict[str, Any]:
    if "train" in _chat(messages)[-1]:
        raise ValueError("its last answer is marked as not trained on")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _as_alpaca(messages: list[Message]) -> dict[str, Any]:
    system = ""
    if _chat(messages)[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    roles = [m["role"] for m in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2) or not roles:
        raise ValueError("Alpaca rows are user and assistant in turn")
    if any("train" in m for m in messages):
        raise ValueError("Alpaca rows can't mark an answer as not trained on")
    texts = [m["content"] for m in messages]
    row: dict[str, Any] = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system
    if len(texts) > 2:
        row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row


DIALECTS: dict[str, Callable[[list[Message]], dict[str, Any]]] = {
    "messages": _as_messages,
    "alpaca": _as_alpaca,
    "sharegpt": _as_sharegpt,
    "prompt-completion": _as_prompt_completion,
}


# ----------------------------------------------------------------------------------------------------- containers


def _own_container(pool: Pool) -> str:
    used = set(pool.table["file"].unique().to_pylist())
    found = {info.container for info in pool.files if info.file in used}
    name = found.pop() if len(found) == 1 else "jsonl"
    return {"arrow": "parquet", "hub": "parquet"}.get(name, name)


#: What a text must hold to hold a number that JSON, or readers of it, have no word for.
_DOUBTFUL = re.compile(r"NaN|Infinity|\d{19}")


class _Lost:
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
        for found, told in (
            (self.nulls, "NaN or infinite, which JSON has no word for: written as null"),
            (self.texts, "beyond signed 64 bits, which JSON readers change: written as text"),
        ):
            if found:
                columns = ", ".join(f"'{name}' {n}" for name, n in found.items())
                log.warning("%s: values of %s are %s (.parquet keeps them)", path, columns, told)


def _say_bytes(pool: Pool, path: Path) -> None:
    used = set(pool.table["file"].unique().to_pylist())
    schemas = [info.schema for info in pool.files if info.file in used and info.schema is not None]
    names = dict.fromkeys(f.name for schema in schemas for f in schema if _has_bytes(f.type))
    if names:
        told = ", ".join(f"'{name}'" for name in names)
        log.warning("%s: bytes of %s are written as base64 text (.parquet keeps them)", path, told)


def _has_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _has_bytes(kind.value_type)
    own = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    inner = [kind.field(k).type for k in range(kind.num_fields)]
    return own or pa.types.is_fixed_size_binary(kind) or any(map(_has_bytes, inner))


@contextmanager
def _packed(part: Path, path: Path) -> Iterator[Any]:
    """Open for writing; a .gz carries no name or time, so that the same rows give the same bytes."""
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


def _write_jsonl(texts: Iterable[str], out: Any, lost: _Lost) -> None:
    for text in texts:
        out.write(lost.text(text).encode("utf-8") + b"\n")


def _write_json(texts: Iterable[str], out: Any, lost: _Lost) -> None:
    out.write(b"[")
    for k, text in enumerate(texts):
        out.write((b",\n" if k else b"\n") + lost.text(text).encode("utf-8"))
    out.write(b"\n]\n")


def _write_csv(texts: Iterable[str], out: Any, lost: _Lost, delimiter: str = ",") -> None:
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


def _write_tsv(texts: Iterable[str], out: Any, lost: _Lost) -> None:
    _write_csv(texts, out, lost, "\t")


_WRITERS: dict[str, Callable[[Iterable[str], Any, _Lost], None]] = {
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "tsv": _write_tsv,
}


def _cell(value: Any, column: str, lost: _Lost) -> str:
    if value is None:
        return ""
    if isinstance(value, (dict, list)):  # the cell is read as JSON again
        value = lost.value(value, column)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pool_table(pool: Pool, *, for_datasets: bool = False) -> pa.Table:
    """Return a pool's rows as a table for Parquet, with their own columns: `original_rows`, else `rows_table`.

    What Parquet has no type for (an interval, a union), or with `for_datasets` what `datasets` can't open (a map), is
    written as it stands in JSON; which columns is said.

    Raises:
        DataError: a Parquet, Arrow or hub file is no longer what was read.
    """
    dialect = _common_dialect(pool)
    found = original_rows(pool) if dialect is None else None
    if found is None:
        used = set(pool.table["file"].unique().to_pylist())
        if dialect is None and any(info.batches is not None for info in pool.files if info.file in used):
            log.warning("the rows' files have columns of other types: they are inferred, dates and bytes become text")
        return rows_table(_texts(pool, dialect))
    foreign = [k for k, field in enumerate(found.schema) if not _in_parquet(field)]
    if for_datasets:
        foreign += [k for k, field in enumerate(found.schema) if k not in foreign and not _in_datasets(field.type)]
    if foreign:
        rows = [json.loads(text) for text in pool.table["raw"].to_pylist()]
        for k in foreign:
            field = found.schema.field(k)
            who = "`datasets`" if _in_parquet(field) else "Parquet"
            log.warning("column '%s': %s has no %s: it is written as it stands in JSON", field.name, who, field.type)
            found = found.set_column(k, field.name, _inferred(field.name, [row[field.name] for row in rows]))
    return found


def _in_parquet(field: pa.Field) -> bool:
    try:
        pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
    except pa.ArrowException:
        return False
    return True


def _in_datasets(kind: pa.DataType) -> bool:
    """Tell whether `datasets` (5.0) has a feature for a type."""
    own = (
        pa.types.is_map,
        pa.types.is_decimal32,
        pa.types.is_decimal64,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    inner = [kind.field(k).type for k in range(kind.num_fields)]
    return not any(foreign(kind) for foreign in own) and all(map(_in_datasets, inner))


def rows_table(texts: Sequence[str]) -> pa.Table:
    """Turn rows' JSON texts into an Arrow table with their own columns, in the order they first stand.

    Types are inferred; a column whose values have no common type is kept as JSON text.
    """
    rows = [json.loads(text) for text in texts]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table([_inferred(name, [row.get(name) for row in rows]) for name in names], names=names)


def write_parquet(texts: Sequence[str], path: str | Path) -> None:
    """Write rows' JSON texts as Parquet with their original columns, for `load_dataset`; whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows_table(texts), part)
    os.replace(part, path)


def _inferred(name: str, values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
        if _in_parquet(pa.field(name, found.type)):
            if pa.types.is_nested(found.type) and found.to_pylist() != values:
                log.warning("column '%s': objects get null for keys that only others have (.jsonl keeps them)", name)
            return found
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    log.warning("column '%s' mixes types, which Parquet can't hold: it is written as JSON text", name)
    lost = _Lost()
    texts = [None if v is None else json.dumps(lost.value(v, name), ensure_ascii=False) for v in values]
    lost.say(name)
    return pa.array(texts, pa.string())
