"""Which rows are in or out of a subset by less than the numbers can tell.

Another batch shape changes a float32 loss by about 1e-7 relative (measured: 4e-8; promised: 1e-6). A chosen row is in
doubt where some row that was left out has the same score within that noise, and the other way round:

    chosen row c and left-out row o are in doubt if   |s_c − s_o|  ≤  ε_c + ε_o

ε is 1e-6 · |s| unless given. A score that is a difference of two losses has more, see `Method.noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from keepset.methods.method import NOISE

COARSE_NOISE = 2e-3  # the allowance for bfloat16 and float16


@dataclass(frozen=True)
class Stability:
    """What a subset's edge looks like.

    Attributes:
        chosen: ids of chosen rows in doubt, worst score first.
        left_out: ids of rows left out in doubt, best score first.
        gap: worst chosen score − best score left out; None where nothing is left out or nothing chosen. Negative where
            the policy isn't plain top-k.
        share: rows in doubt among the chosen.
    """

    chosen: list[str]
    left_out: list[str]
    gap: float | None
    share: float


def stability(
    scores: ArrayLike, ids: Sequence[str] | np.ndarray, selected: ArrayLike, *, noise: ArrayLike | None = None
) -> Stability:
    """Name the rows (n,) whose side of the cut lies within numerical noise.

    A row without a finite score counts neither way; `noise` is absolute, by default `NOISE` · |score|.

    Raises:
        ValueError: lengths differ, or noise is negative or NaN.
    """
    values, chosen, names = np.asarray(scores, float), np.asarray(selected, bool), np.asarray(ids, dtype=str)
    if not len(values) == len(chosen) == len(names):
        raise ValueError(f"{len(values)} scores, {len(names)} ids, {len(chosen)} marks: lengths differ")
    finite = np.isfinite(values)
    epsilon = NOISE * np.abs(values) if noise is None else np.broadcast_to(np.asarray(noise, float), values.shape)
    if not (epsilon[finite] >= 0).all():
        raise ValueError("noise must be 0 or more for every row with a score")
    inside, outside = np.flatnonzero(finite & chosen), np.flatnonzero(finite & ~chosen)
    if not len(inside) or not len(outside):
        return Stability([], [], None, 0.0)
    kept = values[inside] - epsilon[inside], values[inside] + epsilon[inside]
    left = values[outside] - epsilon[outside], values[outside] + epsilon[outside]
    doubt_in, doubt_out = inside[meets(*kept, *left)], outside[meets(*left, *kept)]
    return Stability(
        chosen=names[doubt_in[np.lexsort((names[doubt_in], values[doubt_in]))]].tolist(),
        left_out=names[doubt_out[np.lexsort((names[doubt_out], -values[doubt_out]))]].tolist(),
        gap=float(values[inside].min() - values[outside].max()),
        share=len(doubt_in) / len(inside),
    )


def meets(low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray) -> np.ndarray:
    """Which of the intervals [low, high] (n,) touch one of the others (m,), m >= 1; (n,) bool."""
    order = np.argsort(other_low, kind="stable")
    reach = np.maximum.accumulate(other_high[order])  # how far up those that begin lowest come
    begun = np.searchsorted(other_low[order], high, side="right")
    return (begun > 0) & (reach[np.maximum(begun, 1) - 1] >= low)
