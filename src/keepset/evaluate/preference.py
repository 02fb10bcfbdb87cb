"""Preference accuracy and margin on held-out pairs: policy and implicit reward, sums and means, all and length-matched.

For a pair (prompt x, chosen w, rejected l), with ℓ(y) = log π(y|x) summed over the answer's supervised tokens, T(y)
their number and ℓ₀ the same under the base model:

    policy_sum         m = ℓ(w) − ℓ(l)
    policy_mean        m = ℓ(w)/T(w) − ℓ(l)/T(l)
    implicit_sum       m = [ℓ(w) − ℓ₀(w)] − [ℓ(l) − ℓ₀(l)]                      DPO's implicit reward at β = 1
    implicit_mean      m = [ℓ(w) − ℓ₀(w)]/T(w) − [ℓ(l) − ℓ₀(l)]/T(l)
    implicit_relative  m = [ℓ(w) − ℓ₀(w)]/|ℓ₀(w)| − [ℓ(l) − ℓ₀(l)]/|ℓ₀(l)|      DavIR's score of w minus that of l

accuracy = share of pairs with m > 0, a pair with m = 0 counting one half (the base has an implicit margin of 0 on every
pair, and 0.5 is what it deserves). The summed forms prefer short answers and most real pairs have a longer chosen side,
so on unmatched pairs they measure length first: the length-matched mean form is the headline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from keepset.evaluate.statistics import bootstrap_columns, bootstrap_ratio, correlations

if TYPE_CHECKING:
    from keepset.model.encode import Encoded


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities (nats) and supervised tokens of both sides of m pairs under one model.

    Attributes:
        chosen: (m,) log π(chosen | prompt).
        rejected: (m,) log π(rejected | prompt).
        n_chosen: (m,) supervised tokens of the chosen side.
        n_rejected: (m,) supervised tokens of the rejected side.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    n_chosen: np.ndarray
    n_rejected: np.ndarray

    def __post_init__(self) -> None:
        """Refuse columns that don't fit together, and sides without a token.

        Raises:
            ValueError: as said.
        """
        columns = (self.chosen, self.rejected, self.n_chosen, self.n_rejected)
        if len({np.shape(c) for c in columns}) != 1 or np.ndim(self.chosen) != 1:
            raise ValueError(f"pair columns differ in shape: {[np.shape(c) for c in columns]}")
        if len(self.chosen) and min(self.n_chosen.min(), self.n_rejected.min()) < 1:
            raise ValueError("a side of a pair has no supervised token")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.chosen)


def pair_logps(model: Any, pairs: Sequence[tuple[Encoded, Encoded]], *, token_budget: int = 1024) -> PairLogps:
    """Run the model (adapter on, if it has one) over both sides of every pair.

    The base's own numbers are the same for every trained model: compute them once, with the base model, and hand both
    to `preference_table`.

    Raises:
        ValueError: a pair without a rejected side.
    """
    from keepset.features.losses import row_losses

    if any(rejected is None for _, rejected in pairs):
        raise ValueError("a pair has no rejected side")
    m = len(pairs)
    losses = row_losses(model, [p[0] for p in pairs] + [p[1] for p in pairs], token_budget=token_budget)
    nll, n_tokens = np.asarray(losses.nll[0], dtype=np.float64), np.asarray(losses.n_tokens)
    return PairLogps(-nll[:m], -nll[m:], n_tokens[:m], n_tokens[m:])


def margins(policy: PairLogps, base: PairLogps | None = None) -> dict[str, np.ndarray]:
    """Return the margins (m,) of each form in the module docstring; the implicit ones need the base.

    Raises:
        ValueError: the two were not made from the same pairs.
    """
    n_w, n_l = policy.n_chosen, policy.n_rejected
    out = {
        "policy_sum": policy.chosen - policy.rejected,
        "policy_mean": policy.chosen / n_w - policy.rejected / n_l,
    }
    if base is not None:
        if not (np.array_equal(n_w, base.n_chosen) and np.array_equal(n_l, base.n_rejected)):
            raise ValueError("policy and base were measured on different pairs: their token counts differ")
        ratio_w, ratio_l = policy.chosen - base.chosen, policy.rejected - base.rejected
        out["implicit_sum"] = ratio_w - ratio_l
        out["implicit_mean"] = ratio_w / n_w - ratio_l / n_l
        out["implicit_relative"] = ratio_w / np.abs(base.chosen) - ratio_l / np.abs(base.rejected)
    return out


def preference_loss(policy: PairLogps, base: PairLogps, beta: float = 0.1) -> np.ndarray:
    """DPO's loss of each pair in nats, (m,): −log σ(β · implicit_sum); log 2 where policy and base agree.

    Args:
        policy: the model in question.
        base: the untrained model on the same pairs.
        beta: β; the default is DPO's own.
    """
    return np.logaddexp(0.0, -beta * margins(policy, base)["implicit_sum"])


def correct(margin: ArrayLike) -> np.ndarray:
    """Return 1 where the margin is positive, 0.5 where it is 0, else 0; (m,)."""
    margin = np.asarray(margin)
    return (margin > 0) + 0.5 * (margin == 0)


def length_matched(n_chosen: ArrayLike, n_rejected: ArrayLike, share: float = 0.2) -> np.ndarray:
    """Return which pairs' sides differ by at most `share` of the longer one; (m,) bool."""
    w, l = np.asarray(n_chosen), np.asarray(n_rejected)
    return np.abs(w - l) <= share * np.maximum(w, l)


@dataclass(frozen=True)
class _Summaries:
    """Makes the summary of any group of pairs, see `preference_table`."""

    policy: PairLogps
    by_form: dict[str, np.ndarray]
    resamples: int
    seed: int

    def __call__(self, members: np.ndarray) -> dict[str, Any]:
        """Of the pairs where `members` (m,) is true."""
        index = np.flatnonzero(members)
        if not index.size:
            return {"n": 0}
        policy, draws = self.policy, {"resamples": self.resamples, "seed": self.seed}
        gap = (policy.n_chosen - policy.n_rejected)[index]
        columns = {}
        for form, margin in self.by_form.items():
            columns[f"{form}/accuracy"] = correct(margin[index])
            columns[f"{form}/margin"] = margin[index]
        intervals = bootstrap_columns(columns, **draws)
        summary: dict[str, Any] = {
            "n": int(index.size),
            "chosen_longer": float((gap > 0).mean()),
            "loss_chosen": bootstrap_ratio(-policy.chosen[index], policy.n_chosen[index], **draws).as_dict(),
            "loss_rejected": bootstrap_ratio(-policy.rejected[index], policy.n_rejected[index], **draws).as_dict(),
        }
        for form, margin in self.by_form.items():
            link = correlations(margin[index], gap)
            summary[form] = {
                "accuracy": intervals[f"{form}/accuracy"].as_dict(),
                "margin": intervals[f"{form}/margin"].as_dict(),
                "length_pearson": None if np.isnan(link.pearson) else link.pearson,
                "length_spearman": None if np.isnan(link.spearman) else link.spearman,
            }
        return summary


def preference_table(
    policy: PairLogps,
    base: PairLogps | None = None,
    tasks: ArrayLike | None = None,
    *,
    length_match: float = 0.2,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Summarise pairs: accuracies and margins with bootstrap 95 % intervals over pairs, for everything and per task.

    Without `base` there are no implicit forms; without `tasks` (m,) there is no `tasks` part.

    Returns:
        JSON-able: `{"all": S, "length_matched": S, "tasks": {name: {"all": S, "length_matched": S}}}`, where S holds
        `n`, `chosen_longer` (share of pairs), `loss_chosen` and `loss_rejected` (nats a token) and, for each form,
        `{"accuracy", "margin": interval, "length_pearson", "length_spearman"}`, the last two being the correlation of
        the margin with T(w) − T(l). A group without pairs is `{"n": 0}`.

    Raises:
        ValueError: no pair at all; a NaN among the log-probabilities; or see `margins`.
    """
    if len(policy) == 0:
        raise ValueError("no pairs to evaluate")
    by_form = margins(policy, base)
    matched = length_matched(policy.n_chosen, policy.n_rejected, length_match)

    summary = _Summaries(policy, by_form, resamples, seed)
    everything = np.ones(len(policy), dtype=bool)
    table: dict[str, Any] = {"all": summary(everything), "length_matched": summary(matched)}
    if tasks is not None:
        names = np.asarray(tasks, dtype=str)
        table["tasks"] = {
            str(name): {"all": summary(names == name), "length_matched": summary((names == name) & matched)}
            for name in np.unique(names)
        }
    return table
