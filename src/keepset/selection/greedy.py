"""Greedy diverse selection from embeddings: MMR and facility location.

Embeddings come with rows in rank order (best score first, ties by id), so that the first of equals is the right one.
"""

from __future__ import annotations

import heapq

import numpy as np

from keepset.methods.rds import unit_rows
from keepset.selection.budget import Ledger


def mmr(embeddings: np.ndarray, relevance: np.ndarray, rows: np.ndarray, ledger: Ledger, *, diversity: float) -> None:
    """Maximal marginal relevance (Carbonell & Goldstein 1998): take, again and again,

        argmax_i  (1 − λ) · r_i − λ · max_{a taken} cos(i, a)

    λ = `diversity`: 0 is top-k, 1 ignores the score after the first row. Cost: one product with (n, d) a row taken.
    `rows` (n,) are the pool's indices, by which the ledger says what still fits; embeddings of length 0 are unlike
    everything.
    """
    unit = np.nan_to_num(unit_rows(embeddings)).astype(np.float32)
    nearest = np.zeros(len(unit))  # max over nothing counts as 0
    value = (1 - diversity) * np.asarray(relevance, dtype=np.float64)
    is_open = np.ones(len(unit), dtype=bool)
    while is_open.any() and ledger.left > 0:
        best = int(np.argmax(np.where(is_open, value - diversity * nearest, -np.inf)))
        is_open[best] = False
        if not ledger.admits(int(rows[best])):
            continue
        ledger.take(int(rows[best]))
        similarity = (unit @ unit[best]).astype(np.float64)
        nearest = similarity if len(ledger.taken) == 1 else np.maximum(nearest, similarity)


def facility_location(
    embeddings: np.ndarray,
    relevance: np.ndarray,
    rows: np.ndarray,
    ledger: Ledger,
    *,
    k: int,
    diversity: float,
    block: int = 512,
    keep_bytes: int = 1 << 30,
) -> None:
    """Greedily maximise relevance plus coverage of the pool:

        F(A) = (1 − λ) · Σ_{a in A} r_a + λ · (k / n) · Σ_i max_{a in A} max(0, cos(i, a))

    F is monotone and submodular, so for a budget of k rows without quotas greedy reaches (1 − 1/e) of the best F
    (Nemhauser, Wolsey & Fisher 1978; coverage: facility location as in Lin & Bilmes 2011). With quotas, a partition
    matroid, the bound is 1/2. k / n puts both sums on [0, k]. Lazy (Minoux 1978): a gain once seen bounds later ones,
    so few are computed anew. Without room for all similarities they are made a block at a time; the first pass costs
    n² d either way.

    `embeddings` (n, d) are in rank order, rows of length 0 cover nothing; `relevance` (n,) lies in [0, 1]; `rows` and
    `ledger` as in `mmr`. `k` rows are expected to be taken. Similarities of `block` candidates are held at a time, or
    all n² where they fit in `keep_bytes`, which saves making them anew.
    """
    unit = np.nan_to_num(unit_rows(embeddings)).astype(np.float32)
    n = len(unit)
    covered = np.zeros(n, dtype=np.float32)
    base = (1 - diversity) * np.asarray(relevance, dtype=np.float64)
    scale = diversity * k / max(1, n)

    whole = unit @ unit.T if 4 * n * n <= keep_bytes else None

    def gains(ranks: np.ndarray) -> np.ndarray:
        more = (unit[ranks] @ unit.T if whole is None else whole[ranks]) - covered
        return base[ranks] + scale * np.maximum(more, 0, out=more).sum(axis=1, dtype=np.float64)

    starts = range(0, n, block)
    first = np.concatenate([gains(np.arange(s, min(s + block, n))) for s in starts]) if n else np.zeros(0)
    heap = [(-gain, i, 0) for i, gain in enumerate(first.tolist())]  # (−bound, rank, number taken when it was computed)
    heapq.heapify(heap)
    while heap and ledger.left > 0:
        stale: list[int] = []
        now = len(ledger.taken)
        # grow the batch: usually the first few decide, and a product for many at once is cheap
        while heap and heap[0][2] != now and len(stale) < 16:
            row = heapq.heappop(heap)[1]
            if ledger.admits(int(rows[row])):
                stale.append(row)
        if stale:
            for row, gain in zip(stale, gains(np.array(stale)).tolist(), strict=True):
                heapq.heappush(heap, (-gain, row, now))
            continue
        if not heap:
            return
        best = heapq.heappop(heap)[1]
        if ledger.admits(int(rows[best])):
            ledger.take(int(rows[best]))
            np.maximum(covered, unit @ unit[best], out=covered)
