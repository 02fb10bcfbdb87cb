"""DavIR: data selection via implicit reward (arXiv 2310.13008; v1 was called LoBaSS), and RHO-LM, its plain difference.

    S_DavIR = (L_ini − L_ref) / L_ini = 1 − L_ref / L_ini
    S_/ref  = (L_ini − L_ref) / L_ref = L_ini / L_ref − 1
    S_RHO   =  L_ini − L_ref                 (nats: summed over the T supervised tokens, or their mean)

L_ini: cross-entropy of the completion under the base model. L_ref: under the same model fine-tuned on the whole pool.
DavIR is the same for summed and mean losses, since T cancels; RHO is not, so both forms are named. S_/ref = S / (1 − S)
rises strictly with S below 1: one ranking, two scales. RHO-LOSS itself (arXiv 2206.07137) takes its second loss from a
model trained on held-out data; here it is in-sample, unless the reference is cross-fitted (`cross_fit.py`).

No epsilon and no clip: with the one sums and means differ, with the other rows tie (docs/theory.md, 5.2). L_ini = 0
gives NaN or −inf, which the caller quarantines. The papers' equations were read second-hand: docs/methods.md says from
where.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.errors import RecipeError
from keepset.methods.method import Columns, Features, Method, Scores, difference_noise, signed
from keepset.stages.losses import Losses, reference_losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job

TokenLoss = Literal["ce", "label-smoothed", "focal"]


def davir(loss_ini: np.ndarray, loss_ref: np.ndarray) -> np.ndarray:
    """Return the relative loss drop (n,), at most 1; 0 when the two models agree.

    Losses (n,) are in nats, summed or mean, of both models over the same supervised tokens.
    """
    ini, ref = _losses(loss_ini, loss_ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ini - ref) / ini


def davir_ref(loss_ini: np.ndarray, loss_ref: np.ndarray) -> np.ndarray:
    """Return the drop relative to the reference's loss (n,): DavIR's ranking on an unbounded scale."""
    ini, ref = _losses(loss_ini, loss_ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ini - ref) / ref


def rho(
    loss_ini: np.ndarray,
    loss_ref: np.ndarray,
    n_tokens: np.ndarray | None = None,
    *,
    form: Literal["sum", "mean"] = "sum",
) -> np.ndarray:
    """Return the plain loss drop (n,) in nats.

    Losses (n,) are summed over the `n_tokens` (n,) supervised tokens, in nats. "sum" is the DPO implicit reward over
    beta (without its prompt-only term), "mean" that a token.

    Raises:
        ValueError: "mean" without n_tokens, or an unknown form.
    """
    ini, ref = _losses(loss_ini, loss_ref)
    if form == "sum":
        return ini - ref
    if form != "mean":
        raise ValueError(f"form is 'sum' or 'mean', not {form!r}")
    if n_tokens is None:
        raise ValueError("rho(form='mean') needs n_tokens")
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ini - ref) / np.asarray(n_tokens, dtype=np.float64)


def _losses(loss_ini: np.ndarray, loss_ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ini, ref = np.asarray(loss_ini, dtype=np.float64), np.asarray(loss_ref, dtype=np.float64)
    if ini.shape != ref.shape:
        raise ValueError(f"loss_ini {ini.shape} and loss_ref {ref.shape} must have one shape")
    return ini, ref


@dataclass(frozen=True)
class LossDrop(Method):
    """What the methods on the losses under base and reference share."""

    paper = "DavIR, arXiv 2310.13008"
    needs = ("losses", "reference")
    cost = "reference"
    prefer: Literal["high", "low"] = "high"
    token_loss: TokenLoss = "ce"
    end_of_turn: bool = True

    @property
    def summed_over(self) -> Literal["chosen", "content"]:
        return "chosen" if self.end_of_turn else "content"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        of = self.summed_over
        return {"ini": Losses(token_loss=self.token_loss, of=of), "ref": reference_losses(job, self.token_loss, of)}

    @abstractmethod
    def drop(self, ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        """The score (n,) of summed losses (n,) in nats, before its sign is turned."""

    def score(self, features: Features) -> Scores:
        ini, ref = features["ini"], features["ref"]
        score = self.drop(ini["nll"], ref["nll"], ini["n_tokens"])
        return Scores(signed(score, self.prefer), {"loss_ini": ini["nll"], "loss_ref": ref["nll"]})


@dataclass(frozen=True)
class Davir(LossDrop):
    """Share of the loss that fine-tuning on the pool removed; of a pair: of one side, or chosen less rejected."""

    name = "davir"
    when = (
        "without a target: 3 to 10 % of Alpaca by it beat random rows on held-out loss, as the shortest rows "
        "did; it tells nothing of a target that it does not see"
    )
    formula = "S = (L_ini − L_ref) / L_ini"
    side: Literal["chosen", "rejected", "margin"] = "chosen"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        if self.side == "chosen":
            return super().stages(job, shots)
        if not self.end_of_turn:
            raise RecipeError("davir: `end_of_turn: false` is for `side: chosen`")
        rejected = Losses(token_loss=self.token_loss, of="rejected")
        more = {"ini.rejected": rejected, "ref.rejected": reference_losses(job, self.token_loss, "rejected")}
        return super().stages(job, shots) | more

    def drop(self, ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        return davir(ini, ref)

    def score(self, features: Features) -> Scores:
        if self.side == "chosen":
            return super().score(features)
        parts = {f"loss_{name}": features[name]["nll"] for name in features.stages}
        parts["chosen"] = davir(parts["loss_ini"], parts["loss_ref"])
        parts["rejected"] = davir(parts["loss_ini.rejected"], parts["loss_ref.rejected"])
        score = parts["rejected"] if self.side == "rejected" else parts["chosen"] - parts["rejected"]
        return Scores(signed(score, self.prefer), parts)

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """That of the side that is scored; of a margin, both sides' together."""
        suffixes = {"chosen": ("",), "rejected": (".rejected",), "margin": ("", ".rejected")}[self.side]
        sides = [
            difference_noise(columns[f"loss_ini{s}"], columns[f"loss_ref{s}"], relative=relative) for s in suffixes
        ]
        return np.sum(sides, axis=0)


@dataclass(frozen=True)
class DavirRef(LossDrop):
    """DavIR over the reference's loss: the same ranking."""

    name = "davir-ref"
    when = "never: it ranks as `davir` does"
    formula = "S = (L_ini − L_ref) / L_ref"

    def drop(self, ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        return davir_ref(ini, ref)

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """DavIR's, with the losses' places exchanged."""
        return difference_noise(columns["loss_ref"], columns["loss_ini"], relative=relative)


@dataclass(frozen=True)
class RhoSum(LossDrop):
    """Plain loss drop, summed over tokens."""

    name = "rho-sum"
    when = (
        "without a target, if long rows may win: nearest to the target's loss among the scores that look at no target"
    )
    formula = "S = L_ini − L_ref (summed)"

    def drop(self, ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        return rho(ini, ref)

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        return relative * (np.abs(columns["loss_ini"]) + np.abs(columns["loss_ref"]))


@dataclass(frozen=True)
class RhoMean(LossDrop):
    """Plain loss drop, mean over tokens."""

    name = "rho-mean"
    when = "as `davir`, whose ranking it nearly has"
    formula = "S = (L_ini − L_ref) / T"

    def drop(self, ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        return rho(ini, ref, n_tokens, form="mean")

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        return relative * (np.abs(columns["loss_ini"]) + np.abs(columns["loss_ref"])) / columns["n_tokens"]
