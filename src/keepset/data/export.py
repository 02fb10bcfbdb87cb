"""Rows out: a subset in the input's own dialect and container, or in another one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keepset.data.export_dialects import DIALECTS, common_dialect, texts_in
from keepset.data.export_parquet import pool_table, rows_table
from keepset.data.export_text import WRITERS, Lost, opened
from keepset.data.pool import Pool
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


Extra = tuple[str, np.ndarray]
"""A column to add: its name, and a number for each row (k,)."""


def write_subset(
    pool: Pool, indices: Sequence[int] | np.ndarray, path: str | Path, to: str | None = None, extra: Extra | None = None
) -> None:
    """Write chosen rows, in the order given, with nothing added to them but the `extra` column, if there is one.

    The container goes by `to` if that is one, else by the path's suffix (.gz and .zst compress), else by the input's.
    The dialect is the rows' own; rows of a pool that mixes dialects are written as `messages`. The file appears whole
    or not at all.

    `to` is jsonl, json, csv, parquet, messages, alpaca, sharegpt or prompt-completion; default: as it came.

    Raises:
        DataError: `to` is unknown, the path's suffix promises another container, the rows can't be said in that
            dialect, a row has a column of the extra one's name, or the file can't be written.
    """
    path = Path(path)
    places = pool.places(indices)
    if to is not None and to not in DIALECTS and to not in CONTAINERS.values():
        raise DataError(f"to '{to}' is not known; known: {', '.join([*dict.fromkeys(CONTAINERS.values()), *DIALECTS])}")
    named = container_of(path)
    container = to if to is not None and to not in DIALECTS else named or _own_container(places)
    packed = path.suffix.lower() in (".gz", ".zst")
    if named not in (None, container) or path.suffix.lower() in _FOREIGN or (container == "parquet" and packed):
        raise DataError(f"{path}: the name is none of a {container} file: name it .{container}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # opening it would write where it leads
            part.unlink()
        if container == "parquet":
            chosen = pool.take(indices)
            table = rows_table(texts_in(chosen, to)) if to in DIALECTS else pool_table(chosen)
            if extra is not None:
                if extra[0] in table.column_names:
                    raise _taken(extra[0])
                table = table.append_column(extra[0], pa.array(extra[1], pa.float64()))
            try:
                pq.write_table(table, part)
            except pa.ArrowException as error:
                raise DataError(f"{path}: Parquet can't hold it: {str(error).splitlines()[0]}; write .jsonl") from None
        else:
            dialect = to if to in DIALECTS else common_dialect(places)
            lost = Lost()
            with opened(part, path) as out:
                texts = (text for some in pool.taken(indices) for text in texts_in(some, dialect))
                if extra is not None:
                    texts = (with_number(t, extra[0], float(x)) for t, x in zip(texts, extra[1], strict=True))
                WRITERS[container](texts, out, lost)
            lost.say(path)
            if dialect is None:
                _say_bytes(places, path)
        with open(part, "rb+") as done:
            os.fsync(done.fileno())
        os.replace(part, path)
    except (OSError, DataError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: can't be written: {error.strerror or error}") from None


def with_number(text: str, name: str, value: float) -> str:
    """A row's JSON text with one more key at its end; the rest stays as it is, byte for byte.

    Raises:
        DataError: the row has that key.
    """
    if name in json.loads(text):
        raise _taken(name)
    start = text.rstrip()[:-1].rstrip()
    return f"{start}{', ' if start != '{' else ''}{json.dumps(name, ensure_ascii=False)}: {json.dumps(value)}}}"


def _taken(name: str) -> DataError:
    return DataError(f"the rows have a column '{name}' already; name another with --weight_column")


def container_of(path: Path) -> str | None:
    """Return the container a file name's suffix stands for, or None."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return CONTAINERS.get(suffixes[-1]) if suffixes else None


def _own_container(pool: Pool) -> str:
    used = set(pool.table["file"].unique().to_pylist())
    containers = {info.container for info in pool.files if info.file in used}
    name = containers.pop() if len(containers) == 1 else "jsonl"
    return {"arrow": "parquet", "hub": "parquet"}.get(name, name)


def _say_bytes(pool: Pool, path: Path) -> None:
    used = set(pool.table["file"].unique().to_pylist())
    schemas = [info.schema for info in pool.files if info.file in used and info.schema is not None]
    names = dict.fromkeys(f.name for schema in schemas for f in schema if _has_bytes(f.type))
    if names:
        columns = ", ".join(f"'{name}'" for name in names)
        log.warning("%s: bytes of %s are written as base64 text (.parquet keeps them)", path, columns)


def _has_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _has_bytes(kind.value_type)
    own = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    inner = [kind.field(k).type for k in range(kind.num_fields)]
    return own or pa.types.is_fixed_size_binary(kind) or any(map(_has_bytes, inner))
