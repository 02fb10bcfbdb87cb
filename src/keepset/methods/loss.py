"""One model's loss of the answer as a score: DavIR's two ingredients alone (arXiv 2310.13008), as controls.

    high:  S(z) = L(z) / T(z), or L(z)        low: the same × −1

L: token losses in nats, summed over the T supervised tokens, under the base (`loss`) or the reference (`loss-ref`).
The mean form is `perplexity`'s; the sum follows length. As a control it tells whether the difference of the two losses
does more than either: the highest base loss is what "hard examples" selection keeps.
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def loss(
    nll: np.ndarray,
    n_tokens: np.ndarray,
    *,
    form: Literal["mean", "sum"] = "mean",
    prefer: Literal["high", "low"] = "high",
) -> np.ndarray:
    """Score rows by their loss.

    Args:
        nll: (n,) nats, summed over the supervised tokens.
        n_tokens: (n,) supervised tokens.
        form: a token, or summed.
        prefer: which losses rank first.

    Returns:
        (n,) float64; NaN where a mean has no tokens.

    Raises:
        ValueError: an unknown form or preference.
    """
    if form not in ("mean", "sum") or prefer not in ("high", "low"):
        raise ValueError(f"form is 'mean' or 'sum' and prefer 'high' or 'low', not {form!r} and {prefer!r}")
    values = np.asarray(nll, dtype=np.float64)
    if form == "mean":
        with np.errstate(divide="ignore", invalid="ignore"):
            values = values / np.asarray(n_tokens)
    return values if prefer == "high" else -values
