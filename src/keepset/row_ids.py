"""Rows' ids in 16 bytes each (20 where there are copies) instead of a Python string of 81, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa

BLOCK = 1 << 14
"""Ids that are spelt out at once."""


class Ids(Sequence[str]):
    """The content ids of n rows: 32 hex digits, and `-1`, `-2` … behind those of a second, third … copy.

    Behaves as an array of str where one is read: by number, by an array of numbers or a mask, by iteration, in
    `np.asarray`, in a column of `pa.table`.
    """

    def __init__(self, high: np.ndarray, low: np.ndarray, copies: np.ndarray | None = None) -> None:
        """Take the digests apart.

        Args:
            high: (n,) uint64, the first 16 hex digits.
            low: (n,) uint64, the last 16.
            copies: (n,) int32, the number behind the id, 0 for none; None: no row is a copy.
        """
        self.high, self.low = high, low
        self.copies = copies if copies is not None and copies.any() else None

    @classmethod
    def numbered(cls, digests: bytes | bytearray) -> tuple[Ids, int]:
        """Number the copies among n digests of 16 bytes in row order; the ids, and how many rows are copies."""
        keys = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
        ids = cls(keys[:, 0].astype(np.uint64), keys[:, 1].astype(np.uint64))
        tied = ids._tied()
        if not len(tied):
            return ids, 0
        tied = tied[np.lexsort((tied, ids.low[tied], ids.high[tied]))]
        same = np.zeros(len(tied), dtype=bool)
        same[1:] = (ids.high[tied[1:]] == ids.high[tied[:-1]]) & (ids.low[tied[1:]] == ids.low[tied[:-1]])
        place = np.arange(len(tied))
        copies = np.zeros(len(ids), dtype=np.int32)
        copies[tied] = place - np.maximum.accumulate(np.where(same, 0, place))
        return cls(ids.high, ids.low, copies), int(same.sum())

    def _tied(self) -> np.ndarray:
        """Rows whose first 16 digits another row has too, in the order of those digits."""
        order = np.argsort(self.high, kind="stable")
        equal = self.high[order[1:]] == self.high[order[:-1]]
        if not equal.any():
            return np.zeros(0, dtype=np.int64)
        tied = np.zeros(len(order), dtype=bool)
        tied[1:] |= equal
        tied[:-1] |= equal
        return order[tied]

    def __len__(self) -> int:
        return len(self.high)

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: Any) -> Ids: ...

    def __getitem__(self, at: Any) -> str | Ids:
        """The id of a row; of several rows their ids."""
        if isinstance(at, (int, np.integer)):
            if not -len(self) <= at < len(self):
                raise IndexError(f"row {at} of {len(self)}")
            return self._spelt(np.array([at]))[0]
        at = at if isinstance(at, slice) else np.asarray(at, dtype=None if len(at) else np.int64)
        return Ids(self.high[at], self.low[at], None if self.copies is None else self.copies[at])

    def _spelt(self, at: slice | np.ndarray) -> list[str]:
        text = np.stack([self.high[at], self.low[at]], axis=1).astype(">u8").tobytes().hex()
        ids = [text[k : k + 32] for k in range(0, len(text), 32)]
        if self.copies is None:
            return ids
        return [f"{name}-{n}" if n else name for name, n in zip(ids, self.copies[at].tolist(), strict=True)]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self._spelt(slice(start, start + BLOCK))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype=object if dtype is None else dtype)

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.ChunkedArray:
        return self.arrow() if type is None else self.arrow().cast(type)

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == (np.asarray(other) if isinstance(other, Ids) else other)

    __hash__ = None  # type: ignore[assignment]

    def astype(self, dtype: Any) -> np.ndarray:
        """The ids (n,) as a NumPy array."""
        return np.asarray(self, dtype=dtype)

    def tolist(self) -> list[str]:
        """The ids as a list."""
        return list(self)

    def arrow(self) -> pa.ChunkedArray:
        """The ids as an Arrow column."""
        return pa.chunked_array(self.arrow_blocks(), pa.string())

    def arrow_blocks(self, size: int = BLOCK) -> Iterator[pa.Array]:
        """The ids as Arrow arrays of `size` rows each."""
        for start in range(0, len(self), size):
            yield pa.array(self._spelt(slice(start, start + size)), pa.string())

    def equals(self, other: Ids) -> bool:
        """Whether they are the same ids in the same order."""
        mine, its = self.copies, other.copies
        return (
            np.array_equal(self.high, other.high)
            and np.array_equal(self.low, other.low)
            and (mine is its or (mine is not None and its is not None and np.array_equal(mine, its)))
        )

    @cached_property
    def order(self) -> np.ndarray:
        """(n,) indices that sort the ids as texts; equal ones stay in their order."""
        order = np.argsort(self.high, kind="stable")
        equal = self.high[order[1:]] == self.high[order[:-1]]
        if equal.any():
            tied = np.zeros(len(order), dtype=bool)
            tied[1:] |= equal
            tied[:-1] |= equal
            rows = order[tied]
            numbers = np.zeros(len(rows), np.int32) if self.copies is None else self.copies[rows]
            behind = np.array([f"-{n}" if n else "" for n in numbers.tolist()])
            order[tied] = rows[np.lexsort((behind, self.low[rows], self.high[rows]))]
        return order.astype(np.int32) if len(order) < 2**31 else order

    def places(self, ids: Iterable[str]) -> np.ndarray:
        """Where ids stand among these, (k,) int64; -1 for one that doesn't."""
        wanted = list(ids)
        places = np.full(len(wanted), -1, dtype=np.int64)
        keys = [_key(name) for name in wanted]
        at = np.array([k for k, key in enumerate(keys) if key is not None], dtype=np.int64)
        if not len(at) or not len(self):
            return places
        high, low, copy = (np.array(part) for part in zip(*(keys[k] for k in at.tolist()), strict=True))
        order, copies = self.order, self.copies
        spot = np.searchsorted(self.high, high.astype(np.uint64), sorter=order)
        open_ = np.arange(len(at))
        while len(open_):  # a step for each further row with the same first digits
            open_ = open_[spot[open_] < len(order)]
            row = order[spot[open_]]
            alike = self.high[row] == high[open_]
            hit = alike & (self.low[row] == low[open_]) & ((0 if copies is None else copies[row]) == copy[open_])
            places[at[open_[hit]]] = row[hit]
            open_ = open_[alike & ~hit]
            spot[open_] += 1
        return places


def _key(name: str) -> tuple[np.uint64, np.uint64, int] | None:
    """An id taken apart; None for what isn't one."""
    text, dash, number = name.partition("-")
    try:
        digest, copy = bytes.fromhex(text), int(number) if dash else 0
    except ValueError:
        return None
    if len(text) != 32 or len(digest) != 16 or name != digest.hex() + (f"-{copy}" if copy else ""):
        return None
    return np.uint64(int.from_bytes(digest[:8])), np.uint64(int.from_bytes(digest[8:])), copy


def id_order(ids: Ids | Sequence[str] | np.ndarray) -> np.ndarray:
    """(n,) indices that sort ids as texts; equal ones stay in their order."""
    return ids.order if isinstance(ids, Ids) else np.argsort(np.asarray(ids, dtype=np.str_), kind="stable")


def order_by(keys: np.ndarray, ids: Ids | Sequence[str] | np.ndarray) -> np.ndarray:
    """(n,) indices by ascending key, equal keys by id."""
    if not isinstance(ids, Ids):
        return np.lexsort((np.asarray(ids, dtype=np.str_), keys))
    order = ids.order
    return order[np.argsort(keys[order], kind="stable")]


def same_ids(one: Ids | np.ndarray, other: Ids | np.ndarray) -> bool:
    """Whether they are the same ids in the same order."""
    if isinstance(one, Ids) and isinstance(other, Ids):
        return one is other or one.equals(other)
    return np.array_equal(np.asarray(one), np.asarray(other))
