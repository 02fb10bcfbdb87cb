"""Truncated Monte-Carlo data Shapley (arXiv 1904.02868), for small pools and a utility that really retrains.

    φ(z) = E_π[ U(P_z ∪ {z}) − U(P_z) ],     π: a random order of the rows, P_z: those before z

U: any function of a set of rows, such as minus the target's loss after training on them. A scan stops once |U(all) −
U(P)| is at most `tolerance`: the rows after that get 0 in it (the truncation). With tolerance 0 and `antithetic`, the
estimate is unbiased; each order is then also walked backwards (arXiv 2104.12199), which costs as much and often
halves the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShapleyEstimate:
    """Values with their uncertainty and cost."""

    values: np.ndarray  # (n,)
    standard_errors: np.ndarray  # (n,), over permutations (or antithetic pairs of them)
    evaluations: int  # calls of the utility


def tmc_shapley(
    n: int,
    utility: Callable[[np.ndarray], float],
    *,
    permutations: int = 100,
    tolerance: float = 0.0,
    antithetic: bool = True,
    seed: int = 0,
) -> ShapleyEstimate:
    """Estimate Shapley values by walking random orders.

    Args:
        n: number of rows.
        utility: maps an array of row indices (any order, may be empty) to a number, larger = better.
        permutations: orders walked; an even number with `antithetic`.
        tolerance: truncation; 0 = none.
        antithetic: pair each order with its reverse.
        seed: of the orders.

    Raises:
        ValueError: too few permutations for a standard error.
    """
    rounds = permutations // 2 if antithetic else permutations
    if rounds < 2:
        raise ValueError(f"tmc_shapley needs at least {4 if antithetic else 2} permutations, not {permutations}")
    rng = np.random.default_rng(seed)
    nothing, everything = utility(np.zeros(0, np.int64)), utility(np.arange(n))
    evaluations = 2
    samples = np.zeros((rounds, n))
    for sample in samples:
        order = rng.permutation(n)
        for walk in (order, order[::-1]) if antithetic else (order,):
            before = nothing
            for place in range(n):
                if tolerance > 0 and abs(everything - before) <= tolerance:
                    break
                after = everything if place == n - 1 else utility(walk[: place + 1])
                evaluations += place < n - 1
                sample[walk[place]] += (after - before) / (2 if antithetic else 1)
                before = after
    errors = samples.std(axis=0, ddof=1) / np.sqrt(rounds)
    return ShapleyEstimate(samples.mean(axis=0), errors, evaluations)
