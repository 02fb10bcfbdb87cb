"""Which rows are in or out of a subset by less than the numbers can tell.

Another batch shape changes a float32 loss by about 1e-7 relative (measured: 4e-8; promised: 1e-6). A chosen row is in
doubt where some row that was left out has the same score within that noise, and the other way round:

    chosen row c and left-out row o are in doubt if   |s_c − s_o|  ≤  ε_c + ε_o

ε is 1e-6 · |s| unless given. A score that is a difference of two losses has more, see `score_noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


Columns = Mapping[str, np.ndarray]
Band = Callable[[dict[str, Any], Columns, float], np.ndarray | None]


def of_score(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """A score that is one loss, or one norm."""
    return relative * np.abs(columns["score"])


def of_mean_error(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """EL2N: a mean of distances between distributions; a probability near 1 has the noise of 1, not of its distance."""
    return relative * np.maximum(np.abs(columns["score"]), 1.0)


def of_quotient(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """IFD: a quotient of two losses."""
    return 2 * relative * np.abs(columns["score"])


def of_perplexity(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """The mean loss; under `prefer: mid` a place among the others: the rows it may pass."""
    if options["prefer"] != "mid":
        return of_score(options, columns, relative)
    mean = columns["loss_ini"] / columns["n_tokens"]
    ordered = np.sort(mean)
    near = 1 + 2 * relative
    within = np.searchsorted(ordered, mean * near, "right") - np.searchsorted(ordered, mean / near, "left") - 1
    return within / max(1, len(mean) - 1)


def of_davir(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """DavIR of the side that is scored; of a margin, both sides' noise together."""
    sides = {"chosen": ("",), "rejected": (".rejected",), "margin": ("", ".rejected")}[options["side"]]
    return sum(
        (difference_noise(columns[f"loss_ini{s}"], columns[f"loss_ref{s}"], relative=relative) for s in sides),
        np.zeros(len(columns["score"])),
    )


def of_davir_ref(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """The same over the reference's loss."""
    return difference_noise(columns["loss_ref"], columns["loss_ini"], relative=relative)


def of_drop(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """RHO summed: the noise of both losses."""
    return relative * (np.abs(columns["loss_ini"]) + np.abs(columns["loss_ref"]))


def of_mean_drop(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """RHO over the tokens that were scored."""
    return of_drop(options, columns, relative) / columns["n_tokens"]


def of_cosine(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """A cosine of states: both sides come from a model."""
    return np.full(len(columns["score"]), 2 * relative)


def of_neighbours(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray:
    """KNN-Shapley: its slopes in the similarities sum to 2 / K at most (recursion of `methods/knn_shapley.py`)."""
    return 2 / options["k"] * of_cosine(options, columns, relative)


def of_gradients(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray | None:
    """Cosines of gradients, or dot products with targets no longer than 1.

    None from a store, whose own error is larger (`ckpt<c>.store_rms`), and where gradients are mapped to signs: an
    entry near 0 may turn.
    """
    if "ckpt0.store_rms" in columns or options.get("map") == "sign":
        return None
    if options.get("cosine", True):
        return np.full(len(columns["score"]), relative)
    norms, lr = checkpoint_columns(columns)
    return relative * (lr / lr.sum(axis=0) * norms).sum(axis=0)


def of_tracin(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray | None:
    """Dot products with unit targets, weighted by the learning rates."""
    norms, lr = checkpoint_columns(columns)
    return None if "ckpt0.store_rms" in columns else relative * (lr * norms).sum(axis=0)


def of_gradient_norm(options: dict[str, Any], columns: Columns, relative: float) -> np.ndarray | None:
    """A mean of norms."""
    return None if "ckpt0.store_rms" in columns else of_score(options, columns, relative)


def checkpoint_columns(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Norms and learning rates of every checkpoint, (c, n) each."""
    count = sum(name.startswith("ckpt") and name.endswith(".norm") for name in columns)
    norms, lr = (np.stack([columns[f"ckpt{c}.{part}"] for c in range(count)]) for part in ("norm", "lr"))
    return norms, lr


BANDS: dict[str, Band | None] = {
    "random": None, "length": None, "bm25": None, "dsir": None,  # no model: batches change nothing
    "rds": of_cosine, "rds+": of_cosine, "knn-shapley": of_neighbours,
    "perplexity": of_perplexity, "loss": of_score, "loss-ref": of_score, "ifd": of_quotient, "el2n": of_mean_error,
    "forgetting": None,  # counts events: noise changes nothing or a whole one
    "davir": of_davir, "davir-ref": of_davir_ref, "rho-sum": of_drop, "rho-mean": of_mean_drop,
    "rose": of_gradients, "less": of_gradients, "grad-cosine": of_gradients, "tracin": of_tracin,
    "grad-norm": of_gradient_norm,
    # the solve multiplies noise by the curvature's condition, and a label that is drawn may turn
    "influence": None, "datainf": None, "ekfac": None,
    "in-run-shapley": None, "tmc-shapley": None,  # each step of a training passes its noise on
}  # fmt: skip
"""Each method's noise by its options (defaults filled in), its columns and the noise of one loss; None: not known."""


def score_noise(
    name: str, options: Mapping[str, Any], columns: Columns, *, relative: float = NOISE
) -> np.ndarray | None:
    """Absolute noise (n,) of a method's scores, from the columns stored beside them; None where it isn't known.

    Losses carry `relative`. A cosine carries it absolutely, whatever it is: its terms cancel, their rounding doesn't.

    Args:
        name: the method (not the label).
        options: its options.
        columns: `score`, the method's parts, and `n_tokens`: the tokens its losses are summed over; (n,) each.
        relative: noise of one loss.

    Raises:
        KeyError: a method without an entry in `BANDS`.
    """
    from keepset.methods.gradient import with_defaults

    band = BANDS[name]
    return None if band is None else band(with_defaults(name, dict(options)), columns, relative)
