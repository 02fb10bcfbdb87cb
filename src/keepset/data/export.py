"""Rows out: a subset in the input's own dialect and container or in another one, and Parquet that loads anywhere."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
        DataError: `to` is unknown, the rows can't be said in that dialect, or the file can't be written.
    """
    path = Path(path)
    chosen = pool.take(indices)
    if to is not None and to not in DIALECTS and to not in CONTAINERS.values():
        raise DataError(f"to '{to}' is not known; known: {', '.join([*dict.fromkeys(CONTAINERS.values()), *DIALECTS])}")
    texts = row_texts(chosen, to if to in DIALECTS else None)
    container = container_of(path) or _own_container(chosen)
    if to is not None and to not in DIALECTS:
        container = to
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # opening it would write where it leads
            part.unlink()
        if container == "parquet":
            schema = _own_schema(chosen) if to not in DIALECTS else None
            pq.write_table(rows_table(texts, schema), part)
        else:
            with _packed(part, path) as out:
                _WRITERS[container](texts, out)
        with open(part, "rb+") as done:
            os.fsync(done.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
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
    if to is None:
        used = set(pool.table["file"].unique().to_pylist())
        dialects = {info.dialect for info in pool.files if info.file in used}
        if len(dialects) > 1 and "text" in dialects:
            log.warning("the subset mixes plain text with chats (%s): each row is written as it came", sorted(dialects))
        elif len(dialects) > 1:
            log.info("the subset mixes dialects (%s): it is written as messages", ", ".join(sorted(dialects)))
            to = "messages"
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


def _own_schema(pool: Pool) -> pa.Schema | None:
    used = set(pool.table["file"].unique().to_pylist())
    schemas = [info.schema for info in pool.files if info.file in used]
    same = schemas and schemas[0] is not None and all(s is not None and s.equals(schemas[0]) for s in schemas)
    return schemas[0] if same else None


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


def _write_jsonl(texts: Iterable[str], out: Any) -> None:
    for text in texts:
        out.write(text.encode("utf-8") + b"\n")


def _write_json(texts: Iterable[str], out: Any) -> None:
    out.write(b"[")
    for k, text in enumerate(texts):
        out.write((b",\n" if k else b"\n") + text.encode("utf-8"))
    out.write(b"\n]\n")


def _write_csv(texts: Iterable[str], out: Any, delimiter: str = ",") -> None:
    rows = [json.loads(text) for text in texts]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
        if buffer.tell() > 2**20:
            out.write(buffer.getvalue().encode("utf-8"))
            buffer.seek(0)
            buffer.truncate()
    out.write(buffer.getvalue().encode("utf-8"))


def _write_tsv(texts: Iterable[str], out: Any) -> None:
    _write_csv(texts, out, "\t")


_WRITERS: dict[str, Callable[[Iterable[str], Any], None]] = {
    "jsonl": _write_jsonl,
    "json": _write_json,
    "csv": _write_csv,
    "tsv": _write_tsv,
}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def rows_table(texts: Sequence[str], schema: pa.Schema | None = None) -> pa.Table:
    """Turn rows' JSON texts into an Arrow table with their own columns, in the order they first stand.

    Args:
        texts: one JSON object each.
        schema: the types the columns had, if the rows came from Parquet or Arrow; else they are inferred, and a column
            whose values have no common type is kept as JSON text.
    """
    rows = [json.loads(text) for text in texts]
    names = list(schema.names) if schema is not None else list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        columns.append(_typed(name, values, schema.field(name).type) if schema is not None else _inferred(name, values))
    if schema is not None and all(c.type == f.type for c, f in zip(columns, schema, strict=True)):
        return pa.table(columns, schema=schema)
    return pa.table(columns, names=names)


def write_parquet(texts: Sequence[str], path: str | Path, schema: pa.Schema | None = None) -> None:
    """Write rows' JSON texts as Parquet with their original columns, for `load_dataset`; whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows_table(texts, schema), part)
    os.replace(part, path)


def pool_schema(pool: Pool) -> pa.Schema | None:
    """Return the Arrow schema all of the pool's files share, or None (JSON and CSV have none)."""
    return _own_schema(pool)


def _inferred(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        log.warning("column '%s' mixes types, which Parquet can't hold: it is written as JSON text", name)
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values], pa.string())


def _typed(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return pa.array([None if v is None else base64.b64decode(v) for v in values], kind)
        if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
            return pa.array(values, pa.string()).cast(kind)
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        log.warning("column '%s' of type %s can't be written back as such: its type is inferred", name, kind)
        return _inferred(name, values)
