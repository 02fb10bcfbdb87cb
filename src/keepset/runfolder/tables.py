"""Parquet tables written and read a row group at a time, so that a large one is never twice in memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1 << 20
"""Rows of a file that stand together."""


def write_table(file: IO[bytes], table: pa.Table, *, solid: bool = False) -> None:
    """Write a table; with `solid` the bytes don't depend on how it is cut into chunks."""
    with pq.ParquetWriter(file, table.schema, compression="zstd") as out:
        for start in range(0, max(1, table.num_rows), ROW_GROUP):
            part = table.slice(start, ROW_GROUP)
            out.write_table(part.combine_chunks() if solid else part, row_group_size=ROW_GROUP)


def write_changed(file: IO[bytes], path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write the table of a file with each row group changed; its metadata stays."""
    metadata = pq.read_schema(path).metadata
    with pq.ParquetFile(path) as old:
        parts = (change(old.read_row_group(k)).replace_schema_metadata(metadata) for k in range(old.num_row_groups))
        first = next(parts)
        with pq.ParquetWriter(file, first.schema, compression="zstd") as out:
            for part in chain([first], parts):
                out.write_table(part, row_group_size=ROW_GROUP)


def read_table(path: Path, wanted: Callable[[str], bool] | None = None) -> pa.Table:
    """Read a table, or the columns whose names are wanted."""
    columns = None if wanted is None else [column for column in pq.read_schema(path).names if wanted(column)]
    return pq.read_table(path, columns=columns)
