"""Rows as a stage sees them: ids, and the tokens (or texts) that go through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.data.pool import Message, Pool
from keepset.lazy import BLOCK, Counts, Lazy, change, pick, take
from keepset.model.encode import Encoded, content_only
from keepset.row_ids import Ids, id_order, same_ids
from keepset.runfolder.files import digest, digest_list

if TYPE_CHECKING:
    Sides = tuple[Encoded, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one data set, by id.

    Attributes:
        ids: (n,) unique ids.
        tokens: what a stage looks at of each row: its tokens, the tokens of its sides, or its text; read from the run
            folder when it is asked for.
        data: fingerprint of the data that the rows are from; it stands in the keys of what is computed from them.
    """

    ids: Ids | np.ndarray
    tokens: Sequence[Any]
    data: str

    def __len__(self) -> int:
        """How many."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Name them by the data they are from and their ids."""
        return f"Rows({self.data}, {digest_list(self.ids)})"

    def __eq__(self, other: object) -> bool:
        """Whether they are the same rows of the same data."""
        return isinstance(other, Rows) and self.data == other.data and same_ids(self.ids, other.ids)

    def __hash__(self) -> int:
        """Hash of the data's name."""
        return hash(self.data)

    def part(self, indices: np.ndarray) -> Rows:
        """Some of them, of the same data."""
        return Rows(self.ids[indices], pick(self.tokens, indices), self.data)

    def content_only(self, n_ends: np.ndarray) -> Rows:
        """Their tokens without those that end a turn, of which there are `n_ends` (n,)."""

        def counts() -> Counts | None:
            known = self.tokens.counts() if isinstance(self.tokens, Lazy) else None
            return None if known is None else (known[0], known[1] - n_ends)

        return Rows(self.ids, change(self.tokens, content_only, counts), self.data)

    def alone(self, start: int) -> Rows:
        """Their answers after the single token `start`."""

        def counts() -> Counts | None:
            known = self.tokens.counts() if isinstance(self.tokens, Lazy) else None
            return None if known is None else (known[1] + 1, known[1])

        return Rows(self.ids, change(self.tokens, partial(answer_alone, start=start), counts), self.data)

    def first_supervised(self, n: int | None) -> Rows:
        """Their sides, cut after n supervised tokens each (None: whole)."""
        if n is None:
            return self

        @cache
        def counts() -> Counts:
            order, sizes = id_order(self.ids), np.zeros((2, len(self), len(self.tokens[0])), dtype=np.int64)
            for at in np.split(order, range(BLOCK, len(order), BLOCK)):  # rows of one shard are neighbours
                rows = take(cut, at)
                sizes[0, at] = [[len(side.input_ids) for side in row] for row in rows]
                sizes[1, at] = [[int(side.supervised.sum()) for side in row] for row in rows]
            return sizes[0], sizes[1]

        cut = change(self.tokens, lambda row: tuple(first_supervised(side, n) for side in row), counts)
        return Rows(self.ids, cut, self.data)


def rows_outside(rows: Sequence[Encoded]) -> Rows:
    """Rows that are in no pool, named by their tokens; equal ones by a number too."""
    names = [digest(row.input_ids.tobytes() + row.supervised.tobytes())[:32] for row in rows]
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        ids.append(f"{name}-{seen.get(name, 0)}")
        seen[name] = seen.get(name, 0) + 1
    return Rows(np.array(ids), rows, digest(sorted(ids)))


def answer_alone(row: Encoded, start: int = 0) -> Encoded:
    """A row's supervised tokens after the single token `start`, all of them supervised."""
    ids = np.concatenate([[start], row.input_ids[row.supervised]]).astype(np.int32)
    return Encoded(ids, np.arange(len(ids)) > 0, row.truncated)


def first_supervised(row: Encoded, n: int) -> Encoded:
    """A row cut after its first n supervised tokens."""
    where = np.flatnonzero(row.supervised)
    if len(where) <= n:
        return row
    end = int(where[n - 1]) + 1
    return replace(row, input_ids=row.input_ids[:end], supervised=row.supervised[:end], truncated=True)


class Texts(Lazy[str]):
    """A pool's rows as plain text, all messages joined by line breaks, read when they are asked for."""

    def __init__(self, pool: Pool, rows: np.ndarray) -> None:
        """Take the rows with these numbers, which ascend."""
        self.pool, self.rows = pool, rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: np.ndarray) -> list[str]:
        """The texts of the rows with these numbers."""
        return [as_text(row) for row in self.pool.take(self.rows[at]).all_messages()]

    def __iter__(self) -> Iterator[str]:
        """All of them in order, in one pass over the pool."""
        if len(self.rows) == len(self.pool):
            yield from map(as_text, self.pool.all_messages())
            return
        wanted = np.zeros(len(self.pool), dtype=bool)
        wanted[self.rows] = True
        yield from (as_text(row) for row, use in zip(self.pool.all_messages(), wanted, strict=True) if use)


def as_text(messages: list[Message]) -> str:
    """A row's messages joined by line breaks."""
    return "\n".join(m["content"] for m in messages)
