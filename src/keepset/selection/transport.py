"""Choosing by optimal transport from the target's queries to the pool: KNN-KDE (TSDS, arXiv 2410.11303) and unbalanced.

Both give every row the mass it receives when each of m queries sends out 1/m; rows are then taken by mass. With s(z, q)
the row's column of that query, and each column divided by its largest magnitude, so that a column's scale is no matter:

KNN-KDE, d(z, q) = 1 − s(z, q), ρ(z) ≥ 1 the density of rows about z (copies share one row's mass):

    min_γ  α/C · Σ γ(q, z) d(z, q) + (1 − α) · m · max_qz ρ(z) γ(q, z),    Σ_z γ(q, z) = 1/m,    C = 5

A query fills its nearest rows, each up to 1 / (m s ρ(z)). With N_k = Σ_{i ≤ k} 1/ρ_i over its k nearest, s is the
smallest N at which α/C · Σ_q Σ_{k: N_k ≤ s} (d_next − d_k) / ρ_k reaches (1 − α) · m, so that all lies in one sorting.

Unbalanced, cost c = (1 − s)/2, a and b uniform over queries and rows, λ = 1e-4 (the numbers of the code of
targeted-instruction-selection):

    min_T  Σ T c + ε KL(T | a bᵀ) + λ KL(Tᵀ1 | b),    T1 = a

by Sinkhorn's iteration (Chizat et al., arXiv 1607.05816), whose step shrinks errors by λ / (λ + ε). The POT library
solves the same problem, but it is 175 MB installed and imports torch, against ten lines here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepset.methods.rds import unit_rows
from keepset.selection.ranking import rank_order

SIGMA, C = 0.75, 5.0
"""TSDS's kernel width and scale."""
NEAREST = 5000
"""Rows a query looks at, as in TSDS; density is counted among those that any query looks at."""
LOOSE = 1e-4


def scaled(columns: np.ndarray) -> np.ndarray:
    """Columns (n, m), each divided by its largest magnitude; one of zeros stays."""
    columns = np.asarray(columns, dtype=np.float64)
    largest = np.abs(columns).max(axis=0, initial=0.0)
    return columns / np.where(largest > 0, largest, 1.0)


def density(vectors: np.ndarray, *, block: int = 512) -> np.ndarray:
    """ρ of rows (n, d): Σ_{z'} max(0, 1 − ‖z − z'‖² / σ²) over rows at unit length, itself included, (n,) float64 ≥ 1.

    Rows of length 0 are like nothing. `block` rows are compared at a time.
    """
    unit = np.nan_to_num(unit_rows(vectors)).astype(np.float32)
    others = np.zeros(len(unit))
    for start in range(0, len(unit), block):
        near = unit[start : start + block] @ unit.T
        near = np.maximum(1 - 2 * (1 - near) / SIGMA**2, 0)
        near[np.arange(len(near)), start + np.arange(len(near))] = 0
        others[start : start + block] = near.sum(axis=1, dtype=np.float64)
    return np.round(1 + others, 5)  # so that copies, whose products may differ in the last bit, tie


def nearest_rows(columns: np.ndarray, ids: Sequence[str] | np.ndarray, limit: int = NEAREST) -> np.ndarray:
    """Indices (m, min(n, limit)) of the rows nearest to each query, equal ones by id."""
    return np.stack([rank_order(column, ids)[:limit] for column in columns.T])


def knn_kde(columns: np.ndarray, nearest: np.ndarray, rho: np.ndarray, *, alpha: float = 0.5) -> np.ndarray:
    """Mass (n,) that each row receives, 1 in all.

    `columns` are (n, m); `nearest` (m, k) as `nearest_rows` gives them; `rho` (n,) are densities, looked at for these
    rows only. Where no level s within the k rows is large enough, the largest that every query can reach is taken.
    """
    similarity = scaled(columns)
    n, m = similarity.shape
    distance = 1 - similarity[nearest, np.arange(m)[:, None]]
    weight = 1 / np.asarray(rho, dtype=np.float64)[nearest]
    filled = np.cumsum(weight, axis=1)  # N_k
    gap = (
        np.diff(distance, axis=1) * filled[:, :-1]
    )  # what passing from row k to k + 1 adds to Σ_i (d_next − d_i) / ρ_i
    level, more = filled[:, :-1].ravel(), gap.ravel()
    order = np.argsort(level, kind="stable")
    enough = np.flatnonzero(alpha / C * np.cumsum(more[order]) >= (1 - alpha) * m)
    reach = float(filled[:, -1].min())
    s = min(float(level[order[enough[0]]]), reach) if len(enough) else reach
    before = np.concatenate([np.zeros((m, 1)), filled[:, :-1]], axis=1)
    mass = np.clip(s - before, 0, weight) / (m * s)
    return np.bincount(nearest.ravel(), weights=mass.ravel(), minlength=n)


def transport(columns: np.ndarray, *, reg: float = 0.01) -> np.ndarray:
    """Mass (n,) that each row receives by unbalanced optimal transport, 1 in all; `columns` (n, m), `reg` is ε."""
    similarity = np.ascontiguousarray(scaled(columns).T)
    m, n = similarity.shape
    kernel = np.exp((similarity - 1) / (2 * reg))
    power = LOOSE / (LOOSE + reg)
    v = np.ones(n)
    for _ in range(1000):
        u = 1 / (kernel * v).sum(axis=1) / m
        received = (kernel * u[:, None]).sum(axis=0)
        new = (1 / (n * received)) ** power
        done = np.abs(np.log(new / v)).max() < 1e-12
        v = new
        if done:
            break
    u = 1 / (kernel * v).sum(axis=1) / m
    return v * (kernel * u[:, None]).sum(axis=0)
