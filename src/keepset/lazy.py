"""Sequences whose items are made when they are asked for: rows that lie on disk are never all in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")
S = TypeVar("S")
BLOCK = 1024
"""Items that are made at once where all are gone through."""

Counts = tuple[np.ndarray, np.ndarray]
"""Tokens and supervised tokens of rows, (n,) each; of rows with s sides (n, s)."""


class Lazy(Sequence[T]):
    """Items by number; a part of them is lazy too."""

    @abstractmethod
    def take(self, at: np.ndarray) -> list[T]:
        """The items with these numbers."""

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...

    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        """An item, or a lazy part."""
        if isinstance(at, slice):
            return Part(self, np.arange(*at.indices(len(self))))
        if not -len(self) <= at < len(self):
            raise IndexError(f"item {at} of {len(self)}")
        return self.take(np.array([at % len(self)]))[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), BLOCK):
            yield from self.take(np.arange(start, min(start + BLOCK, len(self))))

    def counts(self) -> Counts | None:
        """Tokens and supervised tokens of each, where that is known without making them."""
        return None


class Part(Lazy[T]):
    """Some items of another sequence, in a given order."""

    def __init__(self, whole: Lazy[T], at: np.ndarray) -> None:
        """Take the items with the numbers `at`."""
        self.whole, self.at = whole, at

    def __len__(self) -> int:
        return len(self.at)

    def take(self, at: np.ndarray) -> list[T]:
        """The items with these numbers."""
        return self.whole.take(self.at[at])

    def counts(self) -> Counts | None:
        """Those of the whole."""
        counts = self.whole.counts()
        return None if counts is None else (counts[0][self.at], counts[1][self.at])


class Changed(Lazy[T]):
    """The items of another sequence, each changed when it is asked for."""

    def __init__(
        self, whole: Lazy[Any], change: Callable[[Any], T], counts: Callable[[], Counts | None] = lambda: None
    ) -> None:
        """Change items by `change`; `counts` tells the changed ones' tokens without making them."""
        self.whole, self.change, self._counts = whole, change, counts

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, at: np.ndarray) -> list[T]:
        """The changed items with these numbers."""
        return [self.change(item) for item in self.whole.take(at)]

    def counts(self) -> Counts | None:
        """What was given."""
        return self._counts()


def take(rows: Sequence[T], at: np.ndarray) -> list[T]:
    """The rows with these numbers, made at once."""
    return rows.take(np.asarray(at)) if isinstance(rows, Lazy) else [rows[i] for i in at]


def pick(rows: Sequence[T], at: np.ndarray) -> Sequence[T]:
    """The rows with these numbers; lazy where the rows are."""
    return Part(rows, np.asarray(at)) if isinstance(rows, Lazy) else [rows[i] for i in at]


def change(rows: Sequence[S], how: Callable[[S], T], counts: Callable[[], Counts | None] = lambda: None) -> Sequence[T]:
    """The rows changed one by one; lazy where the rows are (see `Changed`)."""
    return Changed(rows, how, counts) if isinstance(rows, Lazy) else [how(row) for row in rows]


class Flat(Lazy[T]):
    """The items of a sequence of tuples of one length, end to end."""

    def __init__(self, whole: Lazy[tuple[T, ...]]) -> None:
        """Take the tuples apart."""
        self.whole, self.width = whole, len(whole[0]) if len(whole) else 1

    def __len__(self) -> int:
        return len(self.whole) * self.width

    def take(self, at: np.ndarray) -> list[T]:
        """The items with these numbers."""
        rows = self.whole.take(at // self.width)
        return [row[k] for row, k in zip(rows, (at % self.width).tolist(), strict=True)]

    def counts(self) -> Counts | None:
        """Those of the tuples."""
        counts = self.whole.counts()
        return None if counts is None else (counts[0].ravel(), counts[1].ravel())


def flat(rows: Sequence[tuple[T, ...]]) -> Sequence[T]:
    """The items of all tuples, end to end; lazy where the rows are."""
    return Flat(rows) if isinstance(rows, Lazy) else [item for row in rows for item in row]


def column(rows: Sequence[tuple[T, ...]], k: int) -> Sequence[T]:
    """Item k of each tuple; lazy where the rows are."""

    def counts() -> Counts | None:
        whole = rows.counts() if isinstance(rows, Lazy) else None
        return None if whole is None else (whole[0][:, k], whole[1][:, k])

    return change(rows, itemgetter(k), counts)


def firsts(rows: Sequence[tuple[T, ...]]) -> Sequence[tuple[T, ...]]:
    """The first item of each tuple, as a tuple of one; lazy where the rows are."""

    def counts() -> Counts | None:
        whole = rows.counts() if isinstance(rows, Lazy) else None
        return None if whole is None else (whole[0][:, :1], whole[1][:, :1])

    return change(rows, lambda row: row[:1], counts)
