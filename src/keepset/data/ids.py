"""What hangs on a row's content id: random numbers and folds, which order, files and shards of a pool cannot change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from keepset.row_ids import BLOCK

COPY = re.compile(r"^([0-9a-f]{32})-\d+$")  # the id of a row's second, third ... exact copy


def content_key(row_id: str) -> str:
    """Return the id without the suffix that tells exact copies apart."""
    match = COPY.match(row_id)
    return match[1] if match else row_id


def uniform_by_id(ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) float64 uniform in the open interval (0, 1), a function of (seed, id) alone."""
    key = int(seed).to_bytes(8, "little", signed=True)
    out = np.empty(len(ids))
    source = iter(ids)
    for start in range(0, len(ids), BLOCK):
        digests = b"".join(
            blake2b(str(i).encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
            for i in islice(source, BLOCK)
        )
        out[start : start + BLOCK] = ((np.frombuffer(digests, dtype="<u8") >> np.uint64(11)) + 0.5) * 2.0**-53
    return out


def gumbel_by_id(ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) standard Gumbel noise by id: the k largest of log w + noise are a draw without replacement by w."""
    return -np.log(-np.log(uniform_by_id(ids, seed)))


def fold_of(ids: Sequence[str] | np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Deal rows to folds by content, so that exact copies stay together and order does not matter.

    For cross-fitting (sample splitting, arXiv 1608.00060): each row is scored by a reference model that was not trained
    on it, since a memorised row would score high. Returns (n,) int64 in 0 ... K − 1; the folds' numbers of different
    contents differ by at most one.

    Raises:
        ValueError: K below 2 or above the number of different contents.
    """
    keys, of_row = np.unique(np.array([content_key(str(i)) for i in ids], dtype=np.str_), return_inverse=True)
    if not 2 <= folds <= len(keys):
        raise ValueError(f"folds must be from 2 to the {len(keys)} different rows, not {folds}")
    place = np.argsort(np.argsort(uniform_by_id(keys, seed), kind="stable"), kind="stable")
    return (place % folds)[of_row].astype(np.int64)
