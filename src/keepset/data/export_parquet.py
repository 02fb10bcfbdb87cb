"""Rows out as Parquet that loads anywhere, with their own columns and types."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keepset.data.export_dialects import common_dialect, texts_in
from keepset.data.export_text import Lost
from keepset.data.originals import original_rows
from keepset.data.pool import Pool

log = logging.getLogger(__name__)


def pool_table(pool: Pool, *, for_datasets: bool = False) -> pa.Table:
    """Return a pool's rows as a table for Parquet, with their own columns: `original_rows`, else `rows_table`.

    What Parquet has no type for (an interval, a union), or with `for_datasets` what `datasets` can't open (a map), is
    written as it stands in JSON; which columns is said.

    Raises:
        DataError: a Parquet, Arrow or hub file is no longer what was read.
    """
    dialect = common_dialect(pool)
    table = original_rows(pool) if dialect is None else None
    if table is None:
        used = set(pool.table["file"].unique().to_pylist())
        if dialect is None and any(info.batches is not None for info in pool.files if info.file in used):
            log.warning("the rows' files have columns of other types: they are inferred, dates and bytes become text")
        return rows_table(texts_in(pool, dialect))
    foreign = [k for k, field in enumerate(table.schema) if not _in_parquet(field)]
    if for_datasets:
        foreign += [k for k, field in enumerate(table.schema) if k not in foreign and not _in_datasets(field.type)]
    if foreign:
        rows = [json.loads(text) for text in pool.table["raw"].to_pylist()]
        for k in foreign:
            field = table.schema.field(k)
            who = "`datasets`" if _in_parquet(field) else "Parquet"
            log.warning("column '%s': %s has no %s: it is written as it stands in JSON", field.name, who, field.type)
            table = table.set_column(k, field.name, _inferred(field.name, [row[field.name] for row in rows]))
    return table


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
        array = pa.array(values)
        if _in_parquet(pa.field(name, array.type)):
            if pa.types.is_nested(array.type) and array.to_pylist() != values:
                log.warning("column '%s': objects get null for keys that only others have (.jsonl keeps them)", name)
            return array
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    log.warning("column '%s' mixes types, which Parquet can't hold: it is written as JSON text", name)
    lost = Lost()
    texts = [None if v is None else json.dumps(lost.value(v, name), ensure_ascii=False) for v in values]
    lost.say(name)
    return pa.array(texts, pa.string())
