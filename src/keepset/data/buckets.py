"""Texts to hashed n-grams in a fixed number of buckets: the `data-selection` package's buckets at vectorised speed.

    bucket(g) = SHA-256(the n-gram's tokens joined by spaces, UTF-8) mod 10,000

The n-grams' 64-bit hashes, which are made vectorised, look the bucket up in a table; only an n-gram that isn't there
yet is spelled out and digested. So the slow part is paid once per *different* n-gram (some millions), not once per
n-gram. "fast" takes the 64-bit hash itself modulo 10,000: other n-grams share a bucket, and a small target feels
that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Literal

import numpy as np

from keepset.data.words import Hashes, chunks, hash_tokens, ngrams, patterns, segment_sums

Hash = Literal["sha256", "fast"]
Chunk = list[tuple[np.ndarray, np.ndarray]]  # per order of n-gram: buckets (t,) and the texts' offsets into them


class Sha256Buckets:
    """An open-addressing table from an n-gram's 64-bit hash to its bucket; 24 to 48 bytes an n-gram it knows."""

    def __init__(self, n_buckets: int, most: int = 1 << 22) -> None:
        """Make an empty table that will remember `most` n-grams; later newcomers are digested each time."""
        self.n_buckets, self.most = n_buckets, most
        self.size = 0
        self._allocate(12)

    def __call__(self, hashed: Hashes, n: int) -> np.ndarray:
        """Return the buckets (t,) int32 of hashed n-grams of n tokens each; new ones are digested and kept."""
        slots, filled = self._find(hashed.values)
        buckets = self.buckets[slots]
        missing = np.flatnonzero(~filled)
        if len(missing):
            values, first, back = np.unique(hashed.values[missing], return_index=True, return_inverse=True)
            new = self._digest(hashed, missing[first], n)
            buckets[missing] = new[back]
            room = self.most - self.size
            self._insert(values[:room], new[:room])
        return buckets

    def _allocate(self, log2_slots: int) -> None:
        self.log2_slots = log2_slots
        self.keys = np.zeros(1 << log2_slots, dtype=np.uint64)  # 0 = free: one hash in 2^64 is digested every time
        self.buckets = np.zeros(1 << log2_slots, dtype=np.int32)

    def _find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each value's slot and whether it is there; if not, the slot is the free one where its search ended."""
        slots = (values >> np.uint64(64 - self.log2_slots)).astype(np.int64)
        there = self.keys[slots]
        filled = there == values
        walking = np.flatnonzero(~filled & (there != 0))
        while len(walking):
            slots[walking] = (slots[walking] + 1) & (len(self.keys) - 1)
            there = self.keys[slots[walking]]
            hit = there == values[walking]
            filled[walking[hit]] = True
            walking = walking[~hit & (there != 0)]
        return slots, filled

    def _insert(self, values: np.ndarray, buckets: np.ndarray) -> None:
        """Add distinct new values; doubles the table when it is half full."""
        self.size += len(values)
        if 2 * self.size > len(self.keys):
            used = self.keys != 0
            values, buckets = np.append(self.keys[used], values), np.append(self.buckets[used], buckets)
            self._allocate(int(2 * self.size).bit_length() + 1)
        while len(values):
            slots, _ = self._find(values)
            _, winner = np.unique(slots, return_index=True)  # of those that end at one free slot, the first gets it
            self.keys[slots[winner]], self.buckets[slots[winner]] = values[winner], buckets[winner]
            values, buckets = np.delete(values, winner), np.delete(buckets, winner)

    def _digest(self, hashed: Hashes, places: np.ndarray, n: int) -> np.ndarray:
        """Spell the n-grams out and return SHA-256 modulo the number of buckets, (k,) int32."""
        joined = hashed.joined
        bounds = zip(hashed.starts[places].tolist(), hashed.ends[places].tolist(), strict=True)
        texts = [joined[a:z] for a, z in bounds]
        if n > 1:
            plain, full = (patterns(ascii_only)[True].findall for ascii_only in (True, False))
            texts = [" ".join(plain(text) if text.isascii() else full(text)) for text in texts]
        digests = b"".join([sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts])
        parts = np.frombuffer(digests, dtype=">u4").reshape(-1, 8).astype(np.uint64)
        rest = np.zeros(len(parts), dtype=np.uint64)
        for column in parts.T:
            rest = ((rest << np.uint64(32)) | column) % np.uint64(self.n_buckets)
        return rest.astype(np.int32)


class NgramBuckets:
    """Texts to hashed n-grams: their counts, which add up over shards, and sums of a ratio over each text."""

    def __init__(self, *, n_buckets: int = 10_000, hash: Hash = "sha256") -> None:
        """Take unigrams and bigrams into n_buckets buckets by the named hash."""
        if hash not in ("sha256", "fast"):
            raise ValueError(f"hash is 'sha256' or 'fast', not {hash!r}")
        self.n_buckets = n_buckets
        self.sha256 = Sha256Buckets(n_buckets) if hash == "sha256" else None

    def counts(self, texts: Iterable[str]) -> np.ndarray:
        """Count the n-grams of texts by bucket: (n_buckets,) int64; two shards' counts add up to those of both."""
        return self.sum_counts(map(self.chunk, chunks(texts)))

    def chunk(self, texts: Sequence[str]) -> Chunk:
        """Return (buckets, offsets) of the unigrams, and of the bigrams, of some texts."""
        tokens = hash_tokens(texts, punctuation=True)
        out = []
        for order, hashed in ((1, tokens), (2, ngrams(tokens, 2))):
            if self.sha256 is None:
                buckets = hashed.values % np.uint64(self.n_buckets)
            else:
                buckets = self.sha256(hashed, order)
            out.append((buckets.astype(np.uint16 if self.n_buckets <= 1 << 16 else np.int64), hashed.offsets))
        return out

    def sum_counts(self, parts: Iterable[Chunk]) -> np.ndarray:
        """Sum the counts of hashed chunks."""
        counts = np.zeros(self.n_buckets, dtype=np.int64)
        for part in parts:
            for buckets, _ in part:
                counts += np.bincount(buckets, minlength=self.n_buckets)
        return counts

    def weigh(self, parts: Iterable[Chunk], ratios: np.ndarray, *, per_token: bool) -> np.ndarray:
        """Return the log importance weights (rows, j) of the texts of hashed chunks; a text without n-grams weighs 0.

        `ratios` (n_buckets, j) has a column a task; `per_token` divides by the row's number of n-grams.
        """
        out = [np.zeros((0, ratios.shape[1]))]
        for part in parts:
            sums = np.sum([segment_sums(ratios[buckets], offsets) for buckets, offsets in part], axis=0)
            counts = np.sum([np.diff(offsets) for _, offsets in part], axis=0)
            out.append(sums / np.maximum(counts, 1)[:, None] if per_token else sums)
        return np.concatenate(out)


class _Chunks:
    """The chunks of some texts, cut anew for each pass."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[list[str]]:
        return chunks(self.texts)


class Twice:
    """The pool's hashed chunks, for two passes: the first quarter GiB of buckets is kept, the rest is made anew."""

    def __init__(self, hashing: NgramBuckets, texts: Sequence[str], keep_bytes: int = 1 << 28) -> None:
        """Hash nothing yet."""
        self.hashing, self.room = hashing, keep_bytes
        self.texts: Iterable[list[str]] = _Chunks(texts)
        self.kept: list[Chunk] = []

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks in order."""
        for k, part in enumerate(self.texts):
            made = self.kept[k] if k < len(self.kept) else self.hashing.chunk(part)
            size = sum(buckets.nbytes + offsets.nbytes for buckets, offsets in made)
            if k == len(self.kept) and size <= self.room:
                self.kept.append(made)
                self.room -= size
            yield made
