"""Win rate against a baseline's answers: raw, and controlled for length as in AlpacaEval 2 (arXiv 2404.04475).

With p_i in [0, 1] the judge's preference for the model's answer to prompt i (a tie is 0.5), d_i = length of the model's
answer − length of the baseline's, and t_i = tanh(d_i / sd(d)):

    fit     p_i ~ σ(θ + φ·t_i)     least cross-entropy + ½·ridge·φ²
    then    length-controlled win rate = σ(θ): what the judge would say of answers of equal length.

Where we differ from AlpacaEval 2: no term for the prompt's difficulty (it needs the judgements of many models), and a
ridge on φ in place of AlpacaEval's extra rows of a baseline asked to be brief or verbose, which can't be had offline.
Without a ridge φ runs away when one side is nearly always the longer one. On AlpacaEval 2's stored judgements of 13
models, the official length-controlled ranking is met with Spearman 0.90 and a mean difference of 1.1 points (raw win
rate: 0.75), which is also how ridge = 5 was chosen among 0, 5 and 20.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keepset.evaluate.statistics import Interval, bootstrap_ci, correlations

RIDGE = 5.0


@dataclass(frozen=True)
class WinRate:
    """Shares in 0..1 with their intervals.

    Attributes:
        raw: mean preference.
        length_controlled: σ(θ).
        length_effect: φ, the judge's log-odds for a much longer answer.
        wins: judgements above 0.5.
        ties: at 0.5.
        losses: below.
        longer: share of the model's answers that are the longer ones.
        length_pearson: correlation of preference and length difference; None where one is constant.
    """

    raw: Interval
    length_controlled: Interval
    length_effect: float
    wins: int
    ties: int
    losses: int
    longer: float
    length_pearson: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return asdict(self)


def win_rate(
    preference: ArrayLike,
    length: ArrayLike,
    baseline_length: ArrayLike,
    *,
    ridge: float = RIDGE,
    resamples: int = 1000,
) -> WinRate:
    """Compute both win rates with bootstrap 95 % intervals over prompts.

    Lengths are characters, as in AlpacaEval, or tokens; preferences (n,) lie in [0, 1]. The regression is fitted anew
    in each of the bootstrap's draws.

    Raises:
        ValueError: different numbers of items, none, or a preference outside [0, 1].
    """
    p = np.asarray(preference, dtype=np.float64)
    d = np.asarray(length, dtype=np.float64) - np.asarray(baseline_length, dtype=np.float64)
    if p.shape != d.shape or p.ndim != 1 or not p.size:
        raise ValueError(f"preferences {p.shape} and lengths {d.shape} must be one number an item each, at least one")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a preference lies outside 0..1 or is NaN; AlpacaEval's 1..2 must be shifted by 1 first")
    t = np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)
    n = len(p)
    theta, phi = _fit(p, t, np.ones((1, n)), ridge)
    rng = np.random.default_rng(0)
    draws = []
    for start in range(0, resamples, 100):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(100, resamples - start)).astype(np.float64)
        draws.append(_fit(p, t, counts, ridge)[0])
    low, high = np.percentile(_sigmoid(np.concatenate(draws)), [2.5, 97.5])
    link = correlations(p, d).pearson
    return WinRate(
        raw=bootstrap_ci(p, resamples=resamples),
        length_controlled=Interval(float(_sigmoid(theta)[0]), float(low), float(high), n),
        length_effect=float(phi[0]),
        wins=int((p > 0.5).sum()),
        ties=int((p == 0.5).sum()),
        losses=int((p < 0.5).sum()),
        longer=float((d > 0).mean()),
        length_pearson=None if np.isnan(link) else link,
    )


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _fit(p: np.ndarray, t: np.ndarray, weights: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit θ and φ under each row of weights (r, n) by damped Newton steps: two arrays (r,)."""
    r = len(weights)
    theta, phi = np.zeros(r), np.zeros(r)
    # A small ridge on θ as well: without a single win it would go to -inf.
    floor = 1e-3
    for _ in range(100):
        q = _sigmoid(theta[:, None] + phi[:, None] * t)
        error, curve = weights * (q - p), weights * q * (1 - q)
        g0, g1 = error.sum(1) + floor * theta, error @ t + ridge * phi
        h00, h01, h11 = curve.sum(1) + floor, curve @ t, curve @ (t * t) + ridge + floor
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        scale = np.minimum(1.0, 2.0 / np.maximum(1e-300, np.hypot(step0, step1)))
        theta, phi = theta - scale * step0, phi - scale * step1
        if max(np.abs(step0).max(), np.abs(step1).max()) < 1e-10:
            break
    return theta, phi
