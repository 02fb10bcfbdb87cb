"""Random numbers that belong to a row's content id, so that order, files and shards of a pool cannot change a draw."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def uniform_by_id(ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) float64 uniform in the open interval (0, 1), a function of (seed, id) alone.

    Args:
        ids: (n,) content ids.
        seed: another seed gives independent numbers.
    """
    key = int(seed).to_bytes(8, "little", signed=True)
    digests = b"".join(blake2b(str(i).encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for i in ids)
    return ((np.frombuffer(digests, dtype="<u8") >> np.uint64(11)) + 0.5) * 2.0**-53


def gumbel_by_id(ids: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) standard Gumbel noise by id: the k largest of log w + noise are a draw without replacement by w."""
    return -np.log(-np.log(uniform_by_id(ids, seed)))
