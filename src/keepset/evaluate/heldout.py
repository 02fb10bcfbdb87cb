"""Held-out loss of SFT rows: nats a supervised token, over all tokens and as a mean over rows, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from keepset.evaluate.statistics import bootstrap_ci, bootstrap_ratio

if TYPE_CHECKING:
    from keepset.model.encode import Encoded


@dataclass(frozen=True)
class Heldout:
    """Summed loss (nats) (n,) and supervised tokens (n,) of n held-out rows under one model."""

    nll: np.ndarray
    n_tokens: np.ndarray


def heldout_losses(model: Any, rows: Sequence[Encoded], *, token_budget: int = 1024) -> Heldout:
    """Run the model (adapter on, if it has one) over the rows."""
    from keepset.features.losses import row_losses

    losses = row_losses(model, list(rows), token_budget=token_budget)
    return Heldout(np.asarray(losses.nll[0], dtype=np.float64), np.asarray(losses.n_tokens))


def heldout_table(
    heldout: Heldout, sources: ArrayLike | None = None, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Summarise held-out losses with bootstrap 95 % intervals over rows.

    Returns:
        JSON-able: `{"n", "tokens", "token_mean", "row_mean"}` and, with sources, `"sources": {name: the same}`.
        `token_mean` = Σ nll / Σ tokens weighs long rows more, `row_mean` = mean over rows of nll/tokens weighs all rows
        alike; both in nats a token.

    Raises:
        ValueError: no rows, or a loss that is not finite.
    """

    def summary(index: np.ndarray) -> dict[str, Any]:
        nll, n_tokens = heldout.nll[index], heldout.n_tokens[index]
        return {
            "n": len(nll),
            "tokens": int(n_tokens.sum()),
            "token_mean": bootstrap_ratio(nll, n_tokens, resamples=resamples, seed=seed).as_dict(),
            "row_mean": bootstrap_ci(nll / n_tokens, resamples=resamples, seed=seed).as_dict(),
        }

    table = summary(np.arange(len(heldout.nll)))
    if sources is not None:
        names = np.asarray(sources, dtype=str)
        table["sources"] = {str(name): summary(np.flatnonzero(names == name)) for name in np.unique(names)}
    return table
