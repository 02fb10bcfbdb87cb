"""Near copies between two lists of texts: MinHash bands find candidates, the exact Jaccard of word n-grams decides."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from keepset.selection.dedup import band_keys, jaccard, shingles


def near_copies(texts: list[str], threshold: float) -> int:
    """Rows that nearly repeat an earlier row (exact copies included)."""
    return len(near_pairs(texts, texts, threshold, earlier_only=True))


def near_pairs(
    texts: list[str], others: list[str], threshold: float, *, earlier_only: bool = False, n: int = 5
) -> dict[int, int]:
    """Find, for each text that has one, a near copy among `others` (MinHash bands, then the exact Jaccard of n-grams).

    Args:
        texts: the rows.
        others: what they are held against.
        threshold: least Jaccard of word n-grams.
        earlier_only: `others` are the same rows: a row is held against the earlier ones only.
        n: words of an n-gram.

    Returns:
        index of the text -> index of the other.
    """
    if not texts or not others:
        return {}
    keys = band_keys(texts, threshold, n)
    other_keys = keys if earlier_only else band_keys(others, threshold, n)
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(keys.shape[1])]
    found: dict[int, int] = {}

    def match(i: int) -> int | None:
        near = sorted(
            {j for band, key in zip(buckets, keys[i].tolist(), strict=True) if key for j in band.get(key, ())}
        )
        if not near:
            return None
        hashed = shingles([texts[i], *(others[j] for j in near)], n)
        sets = [np.unique(hashed.values[hashed.offsets[k] : hashed.offsets[k + 1]]) for k in range(len(near) + 1)]
        return next((j for j, other in zip(near, sets[1:], strict=True) if jaccard(sets[0], other) >= threshold), None)

    def store(j: int) -> None:
        for band, key in zip(buckets, other_keys[j].tolist(), strict=True):
            if key:
                band[key].append(j)

    if not earlier_only:
        for j in range(len(others)):
            store(j)
    for i in range(len(texts)):
        other = match(i)
        if other is not None:
            found[i] = other
        elif earlier_only:
            store(i)  # a copy of a copy is near the first one: buckets stay short
    return found
