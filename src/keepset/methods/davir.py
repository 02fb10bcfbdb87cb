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

from typing import Literal

import numpy as np


def davir(loss_ini: np.ndarray, loss_ref: np.ndarray) -> np.ndarray:
    """Return the relative loss drop (n,), at most 1; 0 when the two models agree.

    Args:
        loss_ini: (n,) nats under the base, summed or mean over the supervised tokens.
        loss_ref: (n,) nats under the reference, over the same tokens and in the same form.
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

    Args:
        loss_ini: (n,) nats under the base, summed over the supervised tokens.
        loss_ref: (n,) nats under the reference, summed.
        n_tokens: (n,) supervised tokens; needed for "mean".
        form: "sum" = the DPO implicit reward over beta (without its prompt-only term); "mean" = per token.

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
