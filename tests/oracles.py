"""Slow and obvious ways to what keepset computes fast: what tests hold it against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

import numpy as np

from keepset.features.solvers import datainf_shares, eigenvectors
from keepset.methods.influence import Influence
from keepset.stages.shapley import step_values


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


def dense_solve(hessian: np.ndarray, targets: np.ndarray, *, damping: float = 0.0) -> np.ndarray:
    """Solve (H + λ I) r = v directly: H (p, p), targets and r (j, p)."""
    hessian = np.asarray(hessian, dtype=np.float64)
    return np.linalg.solve(hessian + damping * np.eye(len(hessian)), np.asarray(targets, dtype=np.float64).T).T


def datainf_solve(
    targets: Sequence[np.ndarray], gradients: Sequence[np.ndarray], *, damping: float = 0.1
) -> list[np.ndarray]:
    """DataInf's r (j, d_l) of each layer: targets (j, d_l), and all gradients (n, d_l) of the curvature at hand."""
    solved = []
    for v, g in zip(targets, gradients, strict=True):
        v, g = np.asarray(v, dtype=np.float64), np.asarray(g, dtype=np.float64)
        shares, lam = datainf_shares(g @ v.T, np.einsum("nd,nd->n", g, g), g.shape[1], damping=damping)
        solved.append((v - shares.T @ g / len(g)) / lam)
    return solved


def datainf(
    gradients: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    curvature: Sequence[np.ndarray] | None = None,
    damping: float = 0.1,
) -> np.ndarray:
    """(n, j) scores <g(z_i), r_j> summed over layers; the curvature is that of other rows, or of these."""
    solved = datainf_solve(targets, gradients if curvature is None else curvature, damping=damping)
    return np.sum([np.asarray(g, np.float64) @ r.T for g, r in zip(gradients, solved, strict=True)], axis=0)


def kronecker_bases(inputs: np.ndarray, output_gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """EK-FAC's Q_A (in, in) and Q_B (out, out) of inputs (t, in) and output gradients (t, out) of all tokens t."""
    factors = [np.asarray(x, dtype=np.float64) for x in (inputs, output_gradients)]
    q_a, q_b = (eigenvectors(x.T @ x) for x in factors)
    return q_a, q_b


def corrected_eigenvalues(gradients: np.ndarray, q_a: np.ndarray, q_b: np.ndarray) -> np.ndarray:
    """EK-FAC's Λ (out, in): mean squares of the rows' gradients (n, out, in) in the eigenbasis."""
    rotated = q_b.T @ np.asarray(gradients, dtype=np.float64) @ q_a
    return np.mean(rotated**2, axis=0)


def in_run_shapley(
    dots: np.ndarray, lr: np.ndarray, in_batch: np.ndarray, curvature: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The steps' Shapley values summed (`methods/in_run_shapley.py`): scores (n,), mean over tasks, and (n, j).

    Args:
        dots: (t, n, j) <v_tj, g_i>; what stands for rows outside a step's batch is ignored.
        lr: (t,) learning rates.
        in_batch: (t, n) bool.
        curvature: (t, n, j) g_iᵀ H_tj Σ_{batch} g; None: first order.
    """
    steps = zip(dots, lr, in_batch, [None] * len(dots) if curvature is None else curvature, strict=True)
    per_task = sum(step_values(d, rate, c) * inside[:, None] for d, rate, inside, c in steps)
    return per_task.mean(axis=1), per_task


def influence(dots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The method's scores (n,) of dots (n, j) with the solved targets, and per task (n, j)."""
    return Influence().reduce_dots(None, dots[None], np.ones((1, len(dots))), np.ones(1))  # type: ignore[arg-type]
