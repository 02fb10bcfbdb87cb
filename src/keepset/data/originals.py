"""Chosen rows as they stand in Parquet, Arrow or a hub dataset: read again, so that every type and value comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from keepset.data.loading import FileInfo
from keepset.data.tables import batch_rows
from keepset.errors import DataError

if TYPE_CHECKING:
    from keepset.data.pool import Pool


def original_rows(pool: Pool) -> pa.Table | None:
    """Return a pool's rows in their own columns, types and order.

    Files whose columns differ are joined as long as no column has two types; a column that a file lacks is null there.

    Returns:
        The table (k rows), or None: a row comes from JSON or CSV, or the files' columns can't be joined.

    Raises:
        DataError: a file is no longer what was read.
    """
    names = pool.table["file"].to_pylist()
    infos = {info.file: info for info in pool.files}
    used = [infos[name] for name in dict.fromkeys(names)]
    if not used or any(info.batches is None for info in used):
        return None
    lines, raw = pool.table["line"].to_numpy(), pool.table["raw"]
    parts, places = [], []
    for info in used:
        mine = np.flatnonzero(np.array([name == info.file for name in names]))
        mine = mine[np.argsort(lines[mine], kind="stable")]
        parts.append(_read_again(info, lines[mine], raw.take(pa.array(mine)).to_pylist()))
        places.append(mine)
    if all(part.schema.equals(parts[0].schema) for part in parts):
        # not by concat_tables, which breaks list<null> (pyarrow 26)
        batches = [batch for part in parts for batch in part.to_batches()]
        table = pa.Table.from_batches(batches, schema=parts[0].schema)
    else:
        try:
            table = pa.concat_tables(parts, promote_options="default")
            table.validate()
        except pa.ArrowException:
            return None
    return _take(table, np.argsort(np.concatenate(places), kind="stable"))


def _take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    try:
        return table.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # views have no such kernel
        parts = [batch for k in rows.tolist() for batch in table.slice(k, 1).to_batches()]
        return pa.Table.from_batches(parts, schema=table.schema)


def _read_again(info: FileInfo, lines: np.ndarray, raw: list[str]) -> pa.Table:
    """Take these lines (ascending, each once or more) from a file; each must still be the row that `raw` holds."""
    assert info.batches is not None and info.schema is not None
    taken: list[pa.RecordBatch] = []
    start, at = 1, 0
    for batch in info.batches():
        end = int(np.searchsorted(lines, start + batch.num_rows))
        if end > at:
            rows = _take(pa.Table.from_batches([batch]), lines[at:end] - start)
            read = [row for part in rows.to_batches() for row in batch_rows(part, 1, info.file)]
            for k, row in enumerate(read):
                if not isinstance(row, tuple) or row[1] != raw[at + k]:
                    raise DataError(f"{info.file}:{lines[at + k]}: the file has changed since it was read; run again")
            taken += rows.to_batches()
        start, at = start + batch.num_rows, end
    if at < len(lines):
        raise DataError(f"{info.file}:{lines[at]}: the file has changed since it was read; run again")
    return pa.Table.from_batches(taken, schema=info.schema)
