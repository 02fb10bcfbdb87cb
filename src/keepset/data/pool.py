"""Pool: the candidate rows as one Arrow table with content-hash ids, and `load_pool` that reads it."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    unique_ids,
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
    source_names,
)
from keepset.data.reasons import FileRefused, Quarantined, RowProblem
from keepset.data.turns import Turn
from keepset.errors import DataError

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
        quarantine: rows that can't be used, with their place and reason.
        duplicates: rows whose content stands earlier in the pool; they stay in and have ids ending in -1, -2 …
        files: what each file was found to be.
    """

    table: pa.Table
    quarantine: tuple[Quarantined, ...] = ()
    duplicates: int = 0
    files: tuple[FileInfo, ...] = ()

    def __len__(self) -> int:
        """Return the number of usable rows."""
        return int(self.table.num_rows)

    @property
    def n_in(self) -> int:
        """Rows read: usable + quarantined."""
        return len(self) + len(self.quarantine)

    @property
    def ids(self) -> np.ndarray:
        """Content ids (n,), object array of str."""
        return np.array(self.table["id"].to_pylist(), dtype=object)

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
        return np.array(self.table["source"].to_pylist(), dtype=object)

    def categories(self) -> np.ndarray:
        """Return the category of each row (n,), object array of str or None."""
        return np.array(self.table["category"].to_pylist(), dtype=object)

    def messages(self, index: int) -> list[Message]:
        """Return one row's messages."""
        messages: list[Message] = marked(self.table["messages"][int(index)].as_py())
        return messages

    def all_messages(self) -> Iterator[list[Message]]:
        """Yield every row's messages in order; much faster than `messages(i)` in a loop, a batch held at a time."""
        for batch in self.table.select(["messages"]).to_batches(max_chunksize=4096):
            yield from chats(batch.column(0))

    def all_pairs(self) -> Iterator[tuple[list[Message], list[Message], list[Message]]]:
        """Yield every row's prompt, chosen and rejected messages; only for a pool of pairs."""
        for batch in self.table.select(["messages", "n_prompt", "rejected"]).to_batches(max_chunksize=4096):
            sides = (
                chats(batch.column("messages")),
                batch.column("n_prompt").to_pylist(),
                chats(batch.column("rejected")),
            )
            for messages, n, rejected in zip(*sides, strict=True):
                yield messages[:n], messages[n:], rejected

    def take(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """Return these rows, in this order; the quarantine and the count of copies belong to the whole and are left."""
        table = self.table.take(pa.array(np.asarray(indices, dtype=np.int64)))
        return replace(self, table=table, quarantine=(), duplicates=0)

    def fingerprint(self) -> str:
        """Return sha256 hex over the sorted ids: the same whatever the order of rows, files and names."""
        return hashlib.sha256("\n".join(sorted(self.table["id"].to_pylist())).encode()).hexdigest()


class _Chunks:
    """The pool's columns while they grow; ids wait as 16-byte digests until every copy is known."""

    def __init__(self, pairs: bool) -> None:
        self.digests = bytearray()
        self.batches: list[pa.RecordBatch] = []
        self.pairs = pairs
        self.schema = pa.schema([*list(POOL_SCHEMA)[1:], *(PAIR_FIELDS if pairs else [])])
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
        self.batches.append(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self.start()

    def table(self) -> tuple[pa.Table, int]:
        self.flush()
        rest = pa.Table.from_batches(self.batches, schema=self.schema)
        ids, duplicates = unique_ids(bytes(self.digests))
        return rest.add_column(0, POOL_SCHEMA.field("id"), ids), duplicates


def load_pool(specs: Specs, *, strict: bool = False, allow_empty: bool = False) -> Pool:
    """Read a pool.

    Args:
        specs: a path, a `DataSpec` / `PoolSpec`, or a list of them. A preference pair is read as prompt + chosen;
            with `pairs: true` its rejected side is kept as well and the id is of both.
        strict: stop at the first bad row instead of quarantining it.
        allow_empty: return a pool without rows rather than raising when every row was quarantined.

    Returns:
        The pool: rows in = rows of the table + rows quarantined.

    Raises:
        FileRefused: (a DataError) a file that can't be used as a whole, a bad row under `strict`, or no usable row.
        DataError: an unknown `format`, a `category_column` that is in no row, or pools with and without `pairs`.
    """
    specs = as_specs(specs)
    if len({spec.pairs for spec in specs}) > 1:
        plain = next(spec.path for spec in specs if not spec.pairs)
        raise DataError(f"{plain}: has no `pairs: true`, but another pool of the recipe has: all or none")
    chunks = _Chunks(specs[0].pairs if specs else False)
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
            _read_file(arriving.info, arriving.rows, source, spec.category_column, strict, chunks, quarantine)
        if spec.category_column and columns:
            check_column_seen(spec, spec.category_column, "category_column", columns)
    table, duplicates = chunks.table()
    pool = Pool(table, tuple(quarantine), duplicates, tuple(files))
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


def _read_file(
    info: FileInfo,
    rows: Iterator[Any],
    source: str,
    category_column: str | None,
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
        try:
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
        chunks.sources.append(source)
        chunks.categories.append(cell_text(row.get(category_column)) if category_column else None)
        chunks.files.append(file)
        chunks.chars += len(text)
        if len(chunks.lines) >= CHUNK_ROWS or chunks.chars > CHUNK_CHARS:
            chunks.flush()
