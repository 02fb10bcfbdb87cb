"""Slow and obvious ways to what keepset computes fast: what tests hold it against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def linear_schedule_means(
    learning_rate: float, steps: int, warmup_ratio: float, epoch_ends: Sequence[int]
) -> list[float]:
    """Mean logged learning rate of each epoch under linear warm-up and decay: what `mean_lr` is, without training.

    With w = ⌈ratio · steps⌉, rate after step s = peak · s/w for s < w, else peak · (steps − s)/(steps − w).

    Args:
        learning_rate: the peak.
        steps: optimiser steps in all.
        warmup_ratio: share of them that warm up.
        epoch_ends: the step after which each epoch ends.
    """
    w = int(np.ceil(warmup_ratio * steps))
    s = np.arange(1, steps + 1)
    rates = learning_rate * np.where(s < w, s / max(w, 1), (steps - s) / max(steps - w, 1))
    bounds = [0, *epoch_ends]
    return [float(rates[a:b].mean()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
