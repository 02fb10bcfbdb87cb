"""Record batches that are too many for memory: they wait in a file without a name and are mapped back from there."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

IN_MEMORY = 64 * 2**20
"""Bytes of batches that stay in memory; a pool of more goes to disk."""

FEW = 128
"""Rows that are read before the memory of a mapping is given back, where they lie anywhere in it."""


class Spool:
    """A table that grows by batches."""

    def __init__(self, schema: pa.Schema, folder: Path | None = None, in_memory: int | None = None) -> None:
        """Nothing is written yet.

        Args:
            schema: of the batches.
            folder: where the file is made; default, and where that can't be written: the system's temporary folder.
            in_memory: bytes from which on the batches go to the file.
        """
        self.schema, self.folder = schema, folder
        self.room = IN_MEMORY if in_memory is None else in_memory
        self.batches: list[pa.RecordBatch] = []
        self.file: IO[bytes] | None = None
        self.writer: pa.RecordBatchFileWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        if self.writer is not None:
            self.writer.write_batch(batch)
            return
        self.batches.append(batch)
        self.room -= batch.nbytes
        if self.room < 0:
            self.file = self._opened()
            self.writer = pa.ipc.new_file(self.file, self.schema)
            for waiting in self.batches:
                self.writer.write_batch(waiting)
            self.batches = []

    def _opened(self) -> IO[bytes]:
        if self.folder is not None:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                return tempfile.TemporaryFile(dir=self.folder)
        return tempfile.TemporaryFile()

    def table(self) -> tuple[pa.Table, mmap.mmap | None]:
        """All batches as a table, and the mapping that they lie in; None where they are in memory."""
        if self.writer is None or self.file is None:
            return pa.Table.from_batches(self.batches, schema=self.schema), None
        self.writer.close()
        self.file.flush()
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file.close()
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all(), mapped


def forget(mapped: tuple[mmap.mmap, ...]) -> None:
    """Give the memory of what was read back: it is read from the file again when it is looked at again."""
    for one in mapped:
        one.madvise(mmap.MADV_DONTNEED)


def rows_at(
    batches: list[pa.RecordBatch], schema: pa.Schema, indices: np.ndarray, mapped: tuple[mmap.mmap, ...] = ()
) -> pa.Table:
    """Rows of a table in the order given, copied; `Table.take` would first put all of its batches together.

    Rows that lie apart bring their neighbours' pages into memory; these are given back every `FEW` rows.
    """
    bounds = np.cumsum([0, *(batch.num_rows for batch in batches)])
    ascending = np.argsort(indices, kind="stable")
    parts, since = [], 0
    for k, local in _by_batch(bounds, indices[ascending]):
        parts.append(batches[k].take(pa.array(local)))
        since += len(local)
        if since >= FEW:
            forget(mapped)
            since = 0
    forget(mapped)
    table = pa.Table.from_batches(parts, schema=schema)
    if np.array_equal(ascending, np.arange(len(indices))):
        return table
    back = np.empty(len(indices), dtype=np.int64)
    back[ascending] = np.arange(len(indices))
    return table.combine_chunks().take(pa.array(back))


def _by_batch(bounds: np.ndarray, ascending: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each batch with at most `FEW` of its rows at a time."""
    if len(ascending) and not 0 <= ascending[0] <= ascending[-1] < bounds[-1]:
        raise IndexError(f"rows {ascending[0]} to {ascending[-1]} of {bounds[-1]}")
    cuts = np.searchsorted(ascending, bounds)
    for k in np.flatnonzero(np.diff(cuts)).tolist():
        for start in range(cuts[k], cuts[k + 1], FEW):
            yield k, ascending[start : min(start + FEW, cuts[k + 1])] - bounds[k]
