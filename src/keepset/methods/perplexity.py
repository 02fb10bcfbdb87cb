"""Perplexity pruning: low, middle or high loss under one model ("When less is more", arXiv 2309.04564).

    low:  S(z) = −L(z) / T(z)      high: S(z) = L(z) / T(z)      mid: S(z) = −|F(z) − 1/2|

L: summed nats, T: supervised tokens, F: the row's place among all mean losses, from 0 to 1. exp is left out: it does
not change a ranking. The paper found the middle best for pre-training data. Under DavIR's two models this is its "ini
alone" and "ref alone" baseline.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from keepset.selection.ranking import percentile


def perplexity(
    nll: np.ndarray, n_tokens: np.ndarray | None = None, *, prefer: Literal["low", "mid", "high"] = "mid"
) -> np.ndarray:
    """Score rows by their mean loss.

    Args:
        nll: (n,) nats, summed over the supervised tokens.
        n_tokens: (n,) supervised tokens; None: `nll` is a mean already (or the sum is meant).
        prefer: which losses rank first.

    Returns:
        (n,) float64. For "mid" the score depends on the other rows; a NaN loss stays NaN and is not counted among them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.asarray(nll, dtype=np.float64) / (1 if n_tokens is None else np.asarray(n_tokens))
    if prefer == "low":
        return -mean
    if prefer == "high":
        return mean
    if prefer != "mid":
        raise ValueError(f"prefer is 'low', 'mid' or 'high', not {prefer!r}")
    out = np.full(mean.shape, np.nan)
    known = ~np.isnan(mean)
    out[known] = -np.abs(percentile(mean[known]) - 0.5)
    return out
