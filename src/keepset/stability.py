"""Which rows are in or out of a subset by less than the numbers can tell.

Another batch shape changes a float32 loss by about 1e-7 relative (measured: 4e-8; promised: 1e-6). A chosen row is in
doubt where some row that was left out has the same score within that noise, and the other way round:

    chosen row c and left-out row o are in doubt if   |s_c − s_o|  ≤  ε_c + ε_o

ε is 1e-6 · |s| unless given. A score that is a difference of two losses has more, see `score_noise`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

NOISE = 1e-6  # relative, float32
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


def difference_noise(loss_ini: ArrayLike, loss_ref: ArrayLike, *, relative: float = NOISE) -> np.ndarray:
    """Absolute noise (n,) of DavIR, (L_ini − L_ref) / L_ini = 1 − r with r = L_ref / L_ini: ε = 2 · relative · |r|.

    Both losses carry `relative`; where the reference learnt little the score is near 0 and ε may be larger than 1e-6 of
    it by far. For RHO, L_ini − L_ref, the noise is `relative` · (|L_ini| + |L_ref|).
    """
    return 2 * relative * np.abs(np.asarray(loss_ref, float) / np.asarray(loss_ini, float))


def score_noise(
    name: str, options: Mapping[str, Any], columns: Mapping[str, np.ndarray], *, relative: float = NOISE
) -> np.ndarray:
    """Absolute noise (n,) of a method's scores, from the columns stored beside them.

    Losses carry `relative`. A cosine carries it absolutely, whatever it is: its terms cancel, their rounding doesn't.

    Args:
        name: the method (not the label).
        options: its options.
        columns: `score`, `n_tokens` and the method's parts, (n,) each.
        relative: noise of one loss.
    """
    score = columns["score"]
    if {"loss_ini", "loss_ref"} <= columns.keys() and name != "loss-ref":
        ini, ref = columns["loss_ini"], columns["loss_ref"]
        if name.startswith("rho"):
            drop = relative * (np.abs(ini) + np.abs(ref))
            return drop / columns["n_tokens"] if name == "rho-mean" else drop
        return difference_noise(ref, ini, relative=relative) if name == "davir-ref" else (
            difference_noise(ini, ref, relative=relative)
        )  # fmt: skip
    if name == "ifd":
        return 2 * relative * np.abs(score)  # a quotient of two losses
    if name == "perplexity" and options.get("prefer", "mid") == "mid":  # a place among the others
        mean = columns["loss_ini"] / columns["n_tokens"]
        ordered = np.sort(mean)
        near = 1 + 2 * relative
        within = np.searchsorted(ordered, mean * near, "right") - np.searchsorted(ordered, mean / near, "left") - 1
        return within / max(1, len(mean) - 1)
    if "ckpt0.norm" in columns and name != "grad-norm":
        count = sum(column.endswith(".norm") for column in columns)
        lr = np.stack([columns[f"ckpt{c}.lr"] for c in range(count)])
        if name == "tracin":
            return relative * sum(lr[c] * columns[f"ckpt{c}.norm"] for c in range(count))
        if options.get("cosine", True):
            return np.full(len(score), relative)
        return relative * sum(lr[c] / lr.sum(axis=0) * columns[f"ckpt{c}.norm"] for c in range(count))
    if name in ("rds", "rds+", "knn-shapley"):
        return np.full(len(score), 2 * relative)  # both sides of the cosine come from a model
    return relative * np.abs(score)
