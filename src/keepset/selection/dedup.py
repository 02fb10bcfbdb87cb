"""Exact and near duplicates: of each set of copies the best-ranked row stays; near copies between two lists of texts.

Near: Jaccard similarity of the sets of word 5-grams (of all the words, for a shorter text) at or above a threshold.
MinHash (Broder 1997) with banding proposes pairs, the sets themselves decide: nothing below the threshold is dropped,
and a pair at the threshold is missed with a chance below 1 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from keepset.data.words import Hashes, chunks, hash_tokens, mix, ngrams

N_HASHES = 128
SHINGLE = 5  # words


def exact_keep(keys: Sequence[str], order: np.ndarray) -> np.ndarray:
    """Return (n,) bool: True for the first row of each key in the given order."""
    seen: set[str] = set()
    keep = np.zeros(len(keys), dtype=bool)
    for i in order.tolist():
        keep[i] = keys[i] not in seen
        seen.add(keys[i])
    return keep


def near_keep(texts: Sequence[str], order: np.ndarray, *, threshold: float = 0.8) -> np.ndarray:
    """Return (n,) bool: False for a row whose Jaccard similarity with an earlier kept row reaches the threshold.

    `order` has the indices, best first; a text without a word is never a duplicate.
    """
    bands = band_keys(texts, threshold, SHINGLE)
    shared = np.zeros(len(texts), dtype=bool)
    for band in bands.T:
        _, place, count = np.unique(band, return_inverse=True, return_counts=True)
        shared |= count[place] > 1
    shared &= bands.any(axis=1)
    rows = order[shared[order]]
    sets: dict[int, np.ndarray] = {}
    for part in np.array_split(rows, len(rows) // 4096 + 1):
        hashed = shingles([texts[i] for i in part], SHINGLE)
        for row, start, end in zip(part.tolist(), hashed.offsets[:-1], hashed.offsets[1:], strict=True):
            sets[row] = np.unique(hashed.values[start:end])
    keep = np.ones(len(texts), dtype=bool)
    kept: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(bands.shape[1])]
    for row in rows.tolist():
        keys = bands[row].tolist()
        near = {other for band, key in zip(kept, keys, strict=True) for other in band.get(key, ())}
        if any(jaccard(sets[row], sets[other]) >= threshold for other in near):
            keep[row] = False
            continue
        for band, key in zip(kept, keys, strict=True):
            band[key].append(row)
    return keep


def near_copies(texts: Sequence[str], threshold: float) -> int:
    """Count rows that nearly repeat an earlier row (exact copies included)."""
    return int((~near_keep(texts, np.arange(len(texts)), threshold=threshold)).sum())


def near_pairs(texts: Sequence[str], others: Sequence[str], threshold: float) -> dict[int, int]:
    """Find, for each text that has one, its first near copy among `others`.

    Returns index of the text -> index of the other.
    """
    keys = band_keys(texts, threshold, SHINGLE)
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(keys.shape[1])]
    for j, row in enumerate(band_keys(others, threshold, SHINGLE).tolist()):
        for bucket, key in zip(buckets, row, strict=True):
            if key:
                bucket[key].append(j)
    pairs = {}
    for i, row in enumerate(keys.tolist()):
        candidates = sorted({j for bucket, key in zip(buckets, row, strict=True) for j in bucket.get(key, ())})
        if candidates:
            hashed = shingles([texts[i], *(others[j] for j in candidates)], SHINGLE)
            own, *sets = (np.unique(part) for part in np.split(hashed.values, hashed.offsets[1:-1]))
            near = [j for j, other in zip(candidates, sets, strict=True) if jaccard(own, other) >= threshold]
            if near:
                pairs[i] = near[0]
    return pairs


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a ∩ b| / |a ∪ b| of two arrays of distinct values."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def shingles(texts: Sequence[str], n: int) -> Hashes:
    """Hash the word n-grams of each text; of a shorter one with any word, the run of all its words."""
    tokens = hash_tokens(texts)
    runs = ngrams(tokens, n)
    counts = np.diff(tokens.offsets)
    short = np.flatnonzero((counts > 0) & (counts < n))
    if not len(short):
        return runs
    whole = np.zeros(len(short), dtype=np.uint64)
    for step in range(n):
        inside = counts[short] > step
        following = tokens.values[np.where(inside, tokens.offsets[short] + step, 0)]
        whole = np.where(inside, mix(whole * np.uint64(0x9E3779B97F4A7C15) + following), whole)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(runs.offsets) + ((counts > 0) & (counts < n)))])
    starts = np.insert(runs.starts, runs.offsets[short], tokens.starts[tokens.offsets[short]])
    ends = np.insert(runs.ends, runs.offsets[short], tokens.ends[tokens.offsets[short + 1] - 1])
    return Hashes(np.insert(runs.values, runs.offsets[short], whole), offsets, starts, ends, runs.joined)


def signatures(hashed: Hashes, n_hashes: int = N_HASHES) -> np.ndarray:
    """Return MinHash signatures (n, n_hashes) uint64; two sets agree in a share of places close to their Jaccard."""
    multipliers = mix(np.arange(1, n_hashes + 1, dtype=np.uint64)) | np.uint64(1)
    out = np.zeros((len(hashed), n_hashes), dtype=np.uint64)
    filled = np.flatnonzero(np.diff(hashed.offsets))
    if len(filled):
        for k, multiplier in enumerate(multipliers):
            out[filled, k] = np.minimum.reduceat(hashed.values * multiplier, hashed.offsets[:-1][filled])
    return out


def band_keys(texts: Sequence[str], threshold: float, n: int) -> np.ndarray:
    """Return (n, bands) uint64: rows that share a key in any band are candidates; all 0 for a text without words.

    The widest bands are taken that still miss a pair at the threshold with a chance (1 − t^r)^b below 1 %.
    """
    width = max((r for r in range(1, 17) if (1 - threshold**r) ** (N_HASHES // r) < 0.01), default=1)
    bands = N_HASHES // width
    parts = []
    for part in chunks(texts):
        marks = signatures(shingles(part, n), bands * width).reshape(len(part), bands, width)
        keys = np.zeros((len(part), bands), dtype=np.uint64)
        for place in range(width):
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + marks[:, :, place])
        keys[~marks.any(axis=(1, 2))] = 0
        parts.append(keys)
    return np.concatenate(parts) if parts else np.zeros((0, bands), dtype=np.uint64)
