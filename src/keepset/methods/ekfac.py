"""EK-FAC influence (arXiv 2308.03296; EK-FAC itself: arXiv 1806.03884), one linear layer at a time.

    G_i = Σ_t δ_it a_itᵀ  (out x in),   A = E[a aᵀ] = Q_A Λ_A Q_Aᵀ,   B = E[δ δᵀ] = Q_B Λ_B Q_Bᵀ
    Λ_kl = E_i[ (Q_Bᵀ G_i Q_A)_kl² ]
    r = Q_B [ (Q_Bᵀ V Q_A) / (Λ + λ) ] Q_Aᵀ

G_i: gradient of row i. a_it: the layer's input at token t of row i; δ_it: the gradient at its output; V: the target's
gradient (out x in). The eigenbasis comes from Kronecker factors, the eigenvalues are refitted in it: exact when the
true eigenvectors are Kronecker products. The paper's curvature is Gauss-Newton with labels drawn from the model;
whoever makes δ decides (with the data's own labels it is the empirical Fisher). λ defaults to 0.1 · mean(Λ), as in
the paper.
"""

from __future__ import annotations

import numpy as np


def eigenvectors(factor: np.ndarray) -> np.ndarray:
    """Return the eigenvectors (d, d), as columns, of a factor: a sum or mean of outer products (d, d)."""
    return np.linalg.eigh(factor)[1]


def ekfac_solve(
    targets: np.ndarray, q_a: np.ndarray, q_b: np.ndarray, eigenvalues: np.ndarray, *, damping: float | None = None
) -> np.ndarray:
    """Return r (j, out, in) for targets V (j, out, in).

    Args:
        targets: the target's gradients in this layer.
        q_a: (in, in) eigenvectors of A.
        q_b: (out, out) eigenvectors of B.
        eigenvalues: Λ (out, in).
        damping: λ; None: 0.1 · mean(Λ).
    """
    lam = 0.1 * eigenvalues.mean() if damping is None else damping
    return q_b @ ((q_b.T @ np.asarray(targets, dtype=np.float64) @ q_a) / (eigenvalues + lam)) @ q_a.T
