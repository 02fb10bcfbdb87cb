"""Slow and obvious ways to what keepset computes fast: what tests hold it against."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np


def enumerate_shapley(n: int, utility: Callable[[np.ndarray], float]) -> np.ndarray:
    """Shapley's definition: the mean gain over all coalitions, by size."""
    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for rows in combinations(others, size):
                gain = utility(np.array([*rows, i])) - utility(np.array(rows, dtype=int))
                values[i] += gain / comb(n - 1, size) / n
    return values
