"""One model's loss of the answer as a score: DavIR's two ingredients alone (arXiv 2310.13008), as controls.

    high:  S(z) = L(z) / T(z), or L(z)        low: the same × −1

L: token losses in nats, summed over the T supervised tokens, under the base (`loss`) or the reference (`loss-ref`).
The mean form is `perplexity`'s; the sum follows length. As a control it tells whether the difference of the two losses
does more than either: the highest base loss is what "hard examples" selection keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from keepset.methods.method import Columns, Cost, Features, Method, Scores, score_noise
from keepset.stages.losses import Losses, reference_losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job

TokenLoss = Literal["ce", "label-smoothed", "focal"]


def loss(
    nll: np.ndarray,
    n_tokens: np.ndarray,
    *,
    form: Literal["mean", "sum"] = "mean",
    prefer: Literal["high", "low"] = "high",
) -> np.ndarray:
    """Score rows by their loss.

    `nll` (n,) is summed over the `n_tokens` (n,) supervised tokens, in nats. Returns (n,) float64; NaN where a mean has
    no tokens.

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


@dataclass(frozen=True)
class Loss(Method):
    """The base's loss alone."""

    name = "loss"
    when = "as a control for `davir`: what the base's loss alone would choose"
    paper = "DavIR, arXiv 2310.13008"
    formula = "S = ±L_ini / T, or ±L_ini"
    needs: ClassVar[tuple[str, ...]] = ("losses",)
    cost: ClassVar[Cost] = "forward"
    prefer: Literal["high", "low"] = "high"
    form: Literal["mean", "sum"] = "mean"
    token_loss: TokenLoss = "ce"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"ini": Losses(token_loss=self.token_loss)}

    def score(self, features: Features) -> Scores:
        ini = features["ini"]
        score = loss(ini["nll"], ini["n_tokens"], form=self.form, prefer=self.prefer)
        return Scores(score, {"loss_ini": ini["nll"]})

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        return score_noise(columns, relative)


@dataclass(frozen=True)
class LossRef(Loss):
    """The reference's loss alone."""

    name = "loss-ref"
    when = "as a control for `davir`: what the reference's loss alone would choose"
    formula = "S = ±L_ref / T, or ±L_ref"
    needs: ClassVar[tuple[str, ...]] = ("losses", "reference")
    cost: ClassVar[Cost] = "reference"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"ini": Losses(token_loss=self.token_loss), "ref": reference_losses(job, self.token_loss)}

    def score(self, features: Features) -> Scores:
        ini, ref = features["ini"], features["ref"]
        score = loss(ref["nll"], ini["n_tokens"], form=self.form, prefer=self.prefer)
        return Scores(score, {"loss_ini": ini["nll"], "loss_ref": ref["nll"]})
