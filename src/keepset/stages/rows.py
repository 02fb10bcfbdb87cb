"""Rows as a stage sees them: ids, and the tokens (or texts) that go through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.model.encode import Encoded, content_only
from keepset.runfolder.files import digest

if TYPE_CHECKING:
    Sides = tuple[Encoded, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one data set, by id.

    Attributes:
        ids: (n,) unique ids.
        tokens: what a stage looks at of each row: its tokens, the tokens of its sides, or its text.
        data: fingerprint of the data that the rows are from; it stands in the keys of what is computed from them.
    """

    ids: np.ndarray
    tokens: Sequence[Any]
    data: str

    def __len__(self) -> int:
        """How many."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Name them by the data they are from and their ids."""
        return f"Rows({self.data}, {digest([str(i) for i in self.ids])})"

    def __eq__(self, other: object) -> bool:
        """Whether they are the same rows of the same data."""
        return isinstance(other, Rows) and self.data == other.data and np.array_equal(self.ids, other.ids)

    def __hash__(self) -> int:
        """Hash of the data's name."""
        return hash(self.data)

    def part(self, indices: np.ndarray) -> Rows:
        """Some of them, of the same data."""
        return Rows(self.ids[indices], [self.tokens[i] for i in indices], self.data)

    def content_only(self) -> Rows:
        """Their tokens without those that end a turn."""
        return Rows(self.ids, [content_only(row) for row in self.tokens], self.data)

    def alone(self, start: int) -> Rows:
        """Their answers after the single token `start`."""
        return Rows(self.ids, [answer_alone(row, start) for row in self.tokens], self.data)

    def first_supervised(self, n: int | None) -> Rows:
        """Their sides, cut after n supervised tokens each (None: whole)."""
        if n is None:
            return self
        return Rows(self.ids, [tuple(first_supervised(side, n) for side in row) for row in self.tokens], self.data)


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
