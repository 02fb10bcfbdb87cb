"""Which rows are in or out of a subset by less than the numbers can tell.

Another batch shape changes a float32 loss by about 1e-7 relative (measured: 4e-8; promised: 1e-6). A chosen row whose
score beats the best row left out by less than that noise might as well have been left out:

    chosen, in doubt      s_i − max_{o out} s_o  ≤  ε_i + ε_o
    left out, in doubt    min_{c in} s_c − s_i   ≤  ε_i + ε_c

ε is 1e-6 · |s| unless given. A score that is a difference of two losses has more: see `difference_noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NOISE = 1e-6  # relative, float32


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
    """Name the rows whose side of the cut lies within numerical noise.

    Args:
        scores: (n,) larger = better; a row without a finite score counts neither way.
        ids: (n,) row ids.
        selected: (n,) bool.
        noise: (n,) or one number, absolute; default `NOISE` · |score|.

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
    worst, best = inside[np.argmin(values[inside])], outside[np.argmax(values[outside])]
    doubt_in = inside[values[inside] - values[best] <= epsilon[inside] + epsilon[best]]
    doubt_out = outside[values[worst] - values[outside] <= epsilon[outside] + epsilon[worst]]
    return Stability(
        chosen=names[doubt_in[np.lexsort((names[doubt_in], values[doubt_in]))]].tolist(),
        left_out=names[doubt_out[np.lexsort((names[doubt_out], -values[doubt_out]))]].tolist(),
        gap=float(values[worst] - values[best]),
        share=len(doubt_in) / len(inside),
    )


def difference_noise(loss_ini: ArrayLike, loss_ref: ArrayLike, *, relative: float = NOISE) -> np.ndarray:
    """Absolute noise (n,) of DavIR, (L_ini − L_ref) / L_ini = 1 − r with r = L_ref / L_ini: ε = 2 · relative · |r|.

    Both losses carry `relative`; where the reference learnt little the score is near 0 and ε may be larger than 1e-6 of
    it by far. For RHO, L_ini − L_ref, the noise is `relative` · (|L_ini| + |L_ref|).
    """
    return 2 * relative * np.abs(np.asarray(loss_ref, float) / np.asarray(loss_ini, float))
