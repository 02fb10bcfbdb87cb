"""Cross-fitting: score each row by a reference model that was not trained on it (sample splitting, arXiv 1608.00060).

DavIR's reference is trained on the rows it scores, so a memorised row scores high. With K folds, K references are
trained, each without one fold, and a row takes its reference loss from the one that left it out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepset.data.ids import uniform_by_id
from keepset.selection.dedup import content_key


def fold_of(ids: Sequence[str] | np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Deal rows to folds by content, so that exact copies stay together and order does not matter.

    Args:
        ids: (n,) content ids.
        folds: K ≥ 2.
        seed: another seed deals anew.

    Returns:
        (n,) int64 in 0 ... K − 1; the folds' numbers of different contents differ by at most one.

    Raises:
        ValueError: K below 2 or above the number of different contents.
    """
    keys, of_row = np.unique(np.array([content_key(str(i)) for i in ids], dtype=np.str_), return_inverse=True)
    if not 2 <= folds <= len(keys):
        raise ValueError(f"folds must be from 2 to the {len(keys)} different rows, not {folds}")
    place = np.argsort(np.argsort(uniform_by_id(keys, seed), kind="stable"), kind="stable")
    return (place % folds)[of_row].astype(np.int64)
