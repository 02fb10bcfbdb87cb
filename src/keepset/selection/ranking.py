"""Orders of rows: by score, by soft sampling. Ties are broken by content id, never by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepset.data.ids import gumbel_by_id
from keepset.row_ids import order_by


def rank_order(scores: np.ndarray, ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return all row indices (n,), best score first, equal scores by id ascending.

    Raises:
        ValueError: a score is NaN or infinite (such a row is to be quarantined, not ranked), or lengths differ.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(ids),):
        raise ValueError(f"scores {scores.shape} and {len(ids)} ids don't fit")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"{len(bad)} scores are not finite, the first is row {ids[bad[0]]}: quarantine them first")
    return order_by(-scores, ids)


def soft_scores(scores: np.ndarray, ids: Sequence[str] | np.ndarray, *, temperature: float, seed: int) -> np.ndarray:
    """Return z / temperature + Gumbel noise (n,): its top k is a draw of k rows without replacement by softmax.

    z is the score with mean 0 and variance 1 over the pool (0 everywhere if all are equal), as in QuRating
    (arXiv 2402.09739). The noise belongs to the id and the seed. Temperature towards 0: top-k; large: random.
    """
    scores = np.asarray(scores, dtype=np.float64)
    spread = scores.std()
    z = (scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)
    return z / temperature + gumbel_by_id(ids, seed)
