"""InstructDiff: the middle band of the loss drop, then the entropy change (arXiv 2601.23006); unmeasured against DavIR.

    Δ(z) = (L_ini − L_ref) / T          the drop; the `band` n rows with the largest and with the smallest are put last
    S(z) = (H_ref − H_ini) / T          large: the reference is less sure of the row's tokens than the base was

H: entropy of the predictions at the T supervised tokens, summed in nats, from the same pass as the losses. The
reference is the base calibrated on a tenth of the pool: `reference.fraction: 0.1`. Followed: the authors'
`selection.py` (band 0.1, lowest H_ini − H_ref first, each a mean over tokens). They drop rows outside the band; here
these rank below every other row, so that no row vanishes. Their token budget is `budget: N tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores
from keepset.stages.losses import Losses, reference_losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job

OUTSIDE = 100.0
"""Nats that a row outside the band is put back by: more than entropies, at most log(words), can differ."""


def instructdiff(drop: np.ndarray, entropy_change: np.ndarray, *, band: float = 0.1) -> np.ndarray:
    """Score rows by the rise of entropy, those outside the middle band of the drop last.

    `drop` and `entropy_change` (n,) are nats a token, the second reference less base. A row's rank by drop is the mean
    of those that it ties with; rows without a finite drop get NaN and aren't counted. Returns (n,) float64.

    Raises:
        ValueError: a band that isn't in [0, 0.5).
    """
    if not 0 <= band < 0.5:
        raise ValueError(
            f"instructdiff: band is a share of the pool at each end, 0 or more and below 0.5, not {band:g}"
        )
    drop = np.asarray(drop, dtype=np.float64)
    ordered = np.sort(drop[np.isfinite(drop)])
    rank = (np.searchsorted(ordered, drop, "left") + np.searchsorted(ordered, drop, "right") - 1) / 2
    trim = int(band * len(ordered) + 1e-9)
    inside = (rank >= trim) & (rank <= len(ordered) - 1 - trim)
    score = np.where(inside, entropy_change, np.asarray(entropy_change, dtype=np.float64) - OUTSIDE)
    return np.where(np.isfinite(drop), score, np.nan)


@dataclass(frozen=True)
class InstructDiff(Method):
    """Rise of entropy under a calibrated reference, in the middle band of the loss drop."""

    name = "instructdiff"
    when = "without a target, with a reference of a tenth of the pool; not measured against `davir` yet"
    paper = "InstructDiff, arXiv 2601.23006"
    formula = "S = (H_ref − H_ini) / T, the band's outside last"
    needs = ("losses", "reference")
    cost = "reference"
    band: float = 0.1

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"ini": Losses(token_loss="entropy"), "ref": reference_losses(job, "entropy")}

    def score(self, features: Features) -> Scores:
        ini, ref = features["ini"], features["ref"]
        with np.errstate(divide="ignore", invalid="ignore"):
            drop, change = ((b - a) / ini["n_tokens"] for b, a in
                            ((ini["nll"], ref["nll"]), (ref["entropy"], ini["entropy"])))  # fmt: skip
        parts = {"loss_ini": ini["nll"], "loss_ref": ref["nll"],
                 "entropy_ini": ini["entropy"], "entropy_ref": ref["entropy"]}  # fmt: skip
        return Scores(instructdiff(drop, change, band=self.band), parts)

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: at the band's edges noise moves a row from one end of the ranking to the other."""
