"""From scores to weights: how much each kept row counts in the loss, 1 on average.

    softmax:  w_i = n · exp(z_i / τ) / Σ_k exp(z_k / τ)      z: the score with mean 0 and variance 1 over the n rows
    rank:     w_i = 2 (r_i + ½) / n                          r: rank from below, 0 ... n − 1; equal scores share theirs

Weights are of the rows that are kept: their mean is 1, so that a training with them has the step sizes of one without.
Not measured against training without weights yet.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from keepset.methods.perplexity import percentile

Form = Literal["softmax", "rank"]


def row_weights(scores: np.ndarray, form: Form, *, temperature: float = 1.0) -> np.ndarray:
    """Weights (n,) of rows by their scores (n,), all finite; `temperature` is softmax's τ, towards 0: one row has all.

    Raises:
        ValueError: a score that isn't finite, a form that is neither, or τ that isn't above 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("a row without a finite score has no weight")
    n = len(scores)
    if form == "rank":
        return 2 * (percentile(scores) * max(1, n - 1) + 0.5) / n if n > 1 else np.ones(n)
    if form != "softmax" or not temperature > 0:
        raise ValueError(f"form is 'softmax' or 'rank' and temperature above 0, not {form!r} and {temperature:g}")
    spread = scores.std() if n else 0.0
    z = (scores - scores.mean()) / spread if spread > 0 else np.zeros(n)
    e = np.exp((z - z.max(initial=-np.inf)) / temperature)
    return n * e / e.sum()
