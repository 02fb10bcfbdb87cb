"""Perplexity pruning: low, middle or high loss under one model ("When less is more", arXiv 2309.04564).

    low:  S(z) = −L(z) / T(z)      high: S(z) = L(z) / T(z)      mid: S(z) = −|F(z) − 1/2|

L: summed nats, T: supervised tokens, F: the row's place among all mean losses, from 0 to 1. exp is left out: it does
not change a ranking. The paper found the middle best for pre-training data. Under DavIR's two models this is its "ini
alone" and "ref alone" baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, score_noise
from keepset.stages.losses import Losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def perplexity(
    nll: np.ndarray, n_tokens: np.ndarray | None = None, *, prefer: Literal["low", "mid", "high"] = "mid"
) -> np.ndarray:
    """Score rows by their mean loss.

    `nll` (n,) is summed over the `n_tokens` (n,) supervised tokens, in nats; without `n_tokens` it is a mean already.
    Returns (n,) float64. For "mid" the score depends on the other rows; a NaN loss stays NaN and is not counted among
    them.
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
    finite = ~np.isnan(mean)
    out[finite] = -np.abs(percentile(mean[finite]) - 0.5)
    return out


def percentile(scores: np.ndarray) -> np.ndarray:
    """Return scores (n,) on [0, 1]: the share of the other rows below, ties counting half; no scale, no outliers."""
    scores = np.asarray(scores, dtype=np.float64)
    ordered = np.sort(scores)
    below, up_to = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    return (below + up_to - 1) / (2.0 * max(1, len(scores) - 1))


@dataclass(frozen=True)
class Perplexity(Method):
    """Low, middle or high mean NLL under the base."""

    name = "perplexity"
    when = (
        "without a target, for one forward pass: as near to the target's loss as `rds` in our bank, by no aim "
        "of its own"
    )
    paper = "arXiv 2309.04564"
    formula = "S = ±L_ini / T, or its middle"
    needs = ("losses",)
    cost = "forward"
    prefer: Literal["low", "mid", "high"] = "mid"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"ini": Losses()}

    def score(self, features: Features) -> Scores:
        ini = features["ini"]
        return Scores(perplexity(ini["nll"], ini["n_tokens"], prefer=self.prefer), {"loss_ini": ini["nll"]})

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """A loss's; under `prefer: mid`, a place among the others, the rows that it may pass."""
        if self.prefer != "mid":
            return score_noise(columns, relative)
        mean = columns["loss_ini"] / columns["n_tokens"]
        ordered = np.sort(mean)
        near = 1 + 2 * relative
        within = np.searchsorted(ordered, mean * near, "right") - np.searchsorted(ordered, mean / near, "left") - 1
        return within / max(1, len(mean) - 1)
