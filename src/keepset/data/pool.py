"""Pool: the candidate rows as one Arrow table with content-hash ids, and `load_pool` that reads it.

A large pool's table lies in a file without a name, mapped into memory (`spool.py`); in memory are its ids, 16 bytes a
row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keepset.data.columns import (
    CHUNK_CHARS,
    CHUNK_ROWS,
    MESSAGES,
    ChatColumn,
    Message,
    chats,
    content_digest,
    marked,
    pair_digest,
)
from keepset.data.dialects import as_pair, as_sft
from keepset.data.loading import (
    FileInfo,
    Specs,
    as_specs,
    cell_text,
    check_column_seen,
    incoming,
    refuse,
    refuse_empty,
    row_weight,
    source_names,
)
from keepset.data.reasons import FileRefused, Quarantined, RowProblem
from keepset.data.spool import Spool, forget, rows_at
from keepset.data.turns import Turn
from keepset.errors import DataError
from keepset.row_ids import BLOCK, Ids

log = logging.getLogger(__name__)

POOL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("category", pa.string()),
        ("messages", MESSAGES),
        ("raw", pa.large_string()),
        ("file", pa.string()),
        ("line", pa.int64()),
    ]
)
PAIR_FIELDS = [pa.field("n_prompt", pa.int64()), pa.field("rejected", MESSAGES)]


@dataclass(frozen=True)
class Pool:
    """The rows to choose from.

    Attributes:
        table: id, source, category, messages, raw (the row's own JSON text), file, line; one row each. A pool of pairs
            also has n_prompt (messages = prompt + chosen, this many of them the prompt's) and rejected (messages).
        ids: content ids (n,); an array of str to whoever reads it.
        quarantine: rows that can't be used, with their place and reason.
        duplicates: rows whose content stands earlier in the pool; they stay in and have ids ending in -1, -2 …
        files: what each file was found to be.
        mapped: the files that the table lies in, if it isn't in memory.
    """

    table: pa.Table
    ids: Ids
    quarantine: tuple[Quarantined, ...] = ()
    duplicates: int = 0
    files: tuple[FileInfo, ...] = ()
    mapped: tuple[mmap.mmap, ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of usable rows."""
        return int(self.table.num_rows)

    @property
    def n_in(self) -> int:
        """Rows read: usable + quarantined."""
        return len(self) + len(self.quarantine)

    @property
    def has_pairs(self) -> bool:
        """Whether every row has a rejected side (`pairs: true`)."""
        return "rejected" in self.table.column_names

    @property
    def dialect(self) -> str:
        """The dialect of the files, or "mixed"."""
        names = {info.dialect for info in self.files if info.dialect != "unknown"}
        return names.pop() if len(names) == 1 else "mixed"

    def sources(self) -> np.ndarray:
        """Return the source of each row (n,), object array of str."""
        return self._labels("source")

    def categories(self) -> np.ndarray:
        """Return the category of each row (n,), object array of str or None."""
        return self._labels("category")

    def _labels(self, column: str) -> np.ndarray:
        """A column of few different texts (n,); equal ones are one object."""
        names: dict[str | None, str | None] = {}
        out = np.empty(len(self), dtype=object)
        start = 0
        for batch in self.batches([column]):
            out[start : start + len(batch)] = [names.setdefault(name, name) for name in batch.column(0).to_pylist()]
            start += len(batch)
        return out

    @cached_property
    def _parts(self) -> list[pa.RecordBatch]:
        return self.table.to_batches()

    def batches(self, columns: Sequence[str], rows: int = 4096) -> Iterator[pa.RecordBatch]:
        """Yield some columns in order, at most so many rows at a time; what was read is not kept in memory."""
        for batch in self.table.select(columns).to_batches(max_chunksize=rows):
            yield batch
            self.forget()

    def forget(self) -> None:
        """Give back the memory of what was read of a table that lies on disk."""
        forget(self.mapped)

    def messages(self, index: int) -> list[Message]:
        """Return one row's messages."""
        messages: list[Message] = marked(self.table["messages"][int(index)].as_py())
        return messages

    def weights(self, column: str) -> np.ndarray:
        """Return what `load_pool(weight_column=column)` checked (n,): how much each row counts in the loss."""
        return np.array([row_weight(json.loads(t), column) for b in self.batches(["raw"]) for t in b[0].to_pylist()])

    def all_messages(self) -> Iterator[list[Message]]:
        """Yield every row's messages in order; much faster than `messages(i)` in a loop, a batch held at a time."""
        for batch in self.batches(["messages"]):
            yield from chats(batch.column(0))

    def all_pairs(self) -> Iterator[tuple[list[Message], list[Message], list[Message]]]:
        """Yield every row's prompt, chosen and rejected messages; only for a pool of pairs."""
        for batch in self.batches(["messages", "n_prompt", "rejected"]):
            sides = (
                chats(batch.column("messages")),
                batch.column("n_prompt").to_pylist(),
                chats(batch.column("rejected")),
            )
            for messages, n, rejected in zip(*sides, strict=True):
                yield messages[:n], messages[n:], rejected

    def take(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """Return these rows, in this order; the quarantine and the count of copies belong to the whole and are left."""
        at = np.asarray(indices, dtype=np.int64)
        table = rows_at(self._parts, self.table.schema, at, self.mapped)
        return replace(self, table=table, ids=self.ids[at], quarantine=(), duplicates=0, mapped=())

    def places(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """Return these rows with no more than their files' names."""
        at = np.asarray(indices, dtype=np.int64)
        names = self.table.select(["file"])
        table = rows_at(names.to_batches(), names.schema, at, self.mapped)
        return replace(self, table=table, ids=self.ids[at], quarantine=(), duplicates=0, mapped=())

    def taken(self, indices: Sequence[int] | np.ndarray, rows: int = 4096) -> Iterator[Pool]:
        """Yield these rows, in this order, as pools of at most so many."""
        for start in range(0, len(indices), rows):
            yield self.take(indices[start : start + rows])

    def fingerprint(self) -> str:
        """Return sha256 hex over the sorted ids: the same whatever the order of rows, files and names."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        whole = hashlib.sha256()
        order = self.ids.order
        for start in range(0, len(order), BLOCK):
            lines = "\n".join(self.ids[order[start : start + BLOCK]])
            whole.update((("\n" if start else "") + lines).encode())
        return whole.hexdigest()


class _Chunks:
    """The pool's columns while they grow; ids wait as 16-byte digests until every copy is known."""

    def __init__(self, pairs: bool, folder: Path | None) -> None:
        self.digests = bytearray()
        self.pairs, self.folder = pairs, folder
        self.schema = pa.schema([*list(POOL_SCHEMA)[1:], *(PAIR_FIELDS if pairs else [])])
        self.spool = Spool(self.schema, folder)
        self.sizes: list[int] = []
        self.start()

    def start(self) -> None:
        self.chats, self.rejected = ChatColumn(), ChatColumn()
        self.n_prompt: list[int] = []
        self.raw: list[str] = []
        self.lines: list[int] = []
        self.sources: list[str] = []
        self.categories: list[str | None] = []
        self.files: list[str] = []
        self.chars = 0

    def flush(self) -> None:
        if not self.lines:
            return
        columns = [
            pa.array(self.sources, pa.string()),
            pa.array(self.categories, pa.string()),
            self.chats.finish(),
            pa.array(self.raw, pa.large_string()),
            pa.array(self.files, pa.string()),
            pa.array(self.lines, pa.int64()),
            *([pa.array(self.n_prompt, pa.int64()), self.rejected.finish()] if self.pairs else []),
        ]
        self.spool.add(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self.sizes.append(len(self.lines))
        self.start()

    def pool(self) -> Pool:
        """All rows; ids lie beside the other columns, batch by batch."""
        self.flush()
        rest, mapped = self.spool.table()
        ids, duplicates = Ids.numbered(self.digests)
        self.digests = bytearray()
        names = Spool(pa.schema([POOL_SCHEMA.field("id")]), self.folder)
        start = 0
        for size in self.sizes:
            column = pa.array(list(ids[start : start + size]), pa.string())
            names.add(pa.RecordBatch.from_arrays([column], schema=names.schema))
            start += size
        column, also_mapped = names.table()
        table = rest.add_column(0, POOL_SCHEMA.field("id"), column["id"])
        return Pool(table, ids, (), duplicates, (), tuple(m for m in (mapped, also_mapped) if m is not None))


def load_pool(
    specs: Specs, *, strict: bool = False, allow_empty: bool = False, folder: Path | None = None,
    weight_column: str | None = None,
) -> Pool:  # fmt: skip
    """Read a pool.

    Args:
        specs: a path, a `DataSpec` / `PoolSpec`, or a list of them. A preference pair is read as prompt + chosen;
            with `pairs: true` its rejected side is kept as well and the id is of both.
        strict: stop at the first bad row instead of quarantining it.
        allow_empty: return a pool without rows rather than raising when every row was quarantined.
        weight_column: a column of numbers, which `Pool.weights` gives; no rule on fields looks at it.
        folder: where a pool too large for memory waits, in a file without a name; default: the temporary folder.

    Returns:
        The pool: rows in = rows of the table + rows quarantined.

    Raises:
        FileRefused: (a DataError) a file that can't be used as a whole, a bad row under `strict`, or no usable row.
        DataError: an unknown `format`, a `category_column` or `weight_column` that is in no row, or pools with and
            without `pairs`.
    """
    specs = as_specs(specs)
    if len({spec.pairs for spec in specs}) > 1:
        plain = next(spec.path for spec in specs if not spec.pairs)
        raise DataError(f"{plain}: has no `pairs: true`, but another pool of the recipe has: all or none")
    chunks = _Chunks(specs[0].pairs if specs else False, folder)
    quarantine: list[Quarantined] = []
    files: list[FileInfo] = []
    for spec, source in zip(specs, source_names(specs), strict=True):
        columns: set[str] = set()
        for arriving in incoming(spec, pairs_first=spec.pairs):
            files.append(arriving.info)
            columns.update(arriving.info.columns)
            if arriving.info.dialect == "unknown":
                _all_bad(arriving.rows, quarantine, strict)
                continue
            named = Named(source, spec.category_column, weight_column)
            _read_file(arriving.info, arriving.rows, named, strict, chunks, quarantine)
        for option, column in (("category_column", spec.category_column), ("weight_column", weight_column)):
            if column and columns:
                check_column_seen(spec, column, option, columns)
    pool = replace(chunks.pool(), quarantine=tuple(quarantine), files=tuple(files))
    if not len(pool) and not allow_empty:
        refuse_empty(quarantine, specs)
    if quarantine:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(q.reason for q in quarantine).most_common(5))
        log.warning("%d of %d rows quarantined: %s", len(quarantine), pool.n_in, counts)
    return pool


def _all_bad(rows: Iterator[Any], quarantine: list[Quarantined], strict: bool) -> None:
    for item in rows:
        if strict:
            raise FileRefused(item.file, item.reason, item.detail, line=item.line)
        quarantine.append(item)


def sides_of(dialect: str) -> Callable[[dict[str, Any]], tuple[list[Turn], list[Turn], list[Turn]]]:
    """Return the function from a raw row to prompt, chosen and rejected, which refuses a row with one side."""
    convert = as_pair(dialect)

    def sides(row: dict[str, Any]) -> tuple[list[Turn], list[Turn], list[Turn]]:
        prompt, chosen, rejected = convert(row)
        if rejected is None:
            raise RowProblem("missing-column", "no column 'rejected', and the pool is of pairs")
        return prompt, chosen, rejected

    return sides


@dataclass(frozen=True)
class Named:
    """What a section says of its rows: their source, and the columns of category and weight."""

    source: str
    category_column: str | None
    weight_column: str | None


def _read_file(
    info: FileInfo,
    rows: Iterator[Any],
    named: Named,
    strict: bool,
    chunks: _Chunks,
    quarantine: list[Quarantined],
) -> None:
    convert: Callable[[dict[str, Any]], Any] = sides_of(info.dialect) if chunks.pairs else as_sft(info.dialect)
    file = info.file
    for item in rows:
        if type(item) is not tuple:
            if strict:
                raise FileRefused(item.file, item.reason, item.detail, line=item.line)
            quarantine.append(item)
            continue
        line, text, row = item
        category_column, weight_column = named.category_column, named.weight_column
        try:
            if weight_column:
                row_weight(row, weight_column)
                content = convert({name: value for name, value in row.items() if name != weight_column})
            else:
                content = convert(row)
            if isinstance(content, tuple):
                prompt, chosen, rejected = content
                turns, digest = prompt + chosen, pair_digest(prompt, chosen, rejected)
            else:
                turns, digest = content, content_digest(content)
        except RowProblem as bad:
            quarantine.append(refuse(file, line, bad.reason, bad.detail, text, strict))
            continue
        chunks.digests += digest
        chunks.chats.append(turns)
        if isinstance(content, tuple):
            chunks.n_prompt.append(len(prompt))
            chunks.rejected.append(rejected)
        chunks.raw.append(text)
        chunks.lines.append(line)
        chunks.sources.append(named.source)
        chunks.categories.append(cell_text(row.get(category_column)) if category_column else None)
        chunks.files.append(file)
        chunks.chars += len(text)
        if len(chunks.lines) >= CHUNK_ROWS or chunks.chars > CHUNK_CHARS:
            chunks.flush()
