"""The linear algebra of influence functions, in float64 on arrays: how r = (C + λI)⁻¹ v is solved for a curvature C.

`curvature` runs the model and calls these. The papers and their formulas stand in methods/influence.py (Fisher,
conjugate gradients), methods/datainf.py and methods/ekfac.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def fisher_coefficients(gram: np.ndarray, dots: np.ndarray, *, damping: float) -> np.ndarray:
    """Solve with F = (1/h) Σ g gᵀ of h rows by h × h matrices alone, never a p × p one (Woodbury's identity).

        (F + λI)⁻¹ v = (v − Σ_i c_i g_i) / λ,     c = (G Gᵀ + hλI)⁻¹ G v

    `gram` (h, h) is G Gᵀ, `dots` (h, j) G v of each target. Returns c (h, j) float64.
    """
    h = len(gram)
    return np.linalg.solve(np.asarray(gram, np.float64) + h * damping * np.eye(h), np.asarray(dots, np.float64))


def cg_solve(
    product: Callable[[np.ndarray], np.ndarray],
    targets: np.ndarray,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
) -> np.ndarray:
    """Solve (H + λ I) r = v by conjugate gradients (Hestenes & Stiefel 1952); needs products with H alone.

    `product` maps (p,) to H times it; targets are (j, p). The residual's norm ends below `tolerance` of the target's.
    Returns (j, p) float64.

    Raises:
        ValueError: a direction of no or negative curvature was met, or the steps ran out; more damping helps.
    """
    solved = []
    for v in np.asarray(targets, dtype=np.float64):
        r, residual, direction = np.zeros_like(v), v.copy(), v.copy()
        size = residual @ residual
        goal = (tolerance * np.linalg.norm(v)) ** 2
        steps = 0
        while size > goal:
            if steps == max_steps:
                raise ValueError(
                    f"conjugate gradients: residual {np.sqrt(size / (v @ v)):.1e} after {steps} steps, wanted "
                    f"{tolerance:.1e}; raise damping ({damping:g})"
                )
            image = product(direction) + damping * direction
            curvature = direction @ image
            if not curvature > 0:
                raise ValueError(
                    f"conjugate gradients: curvature {curvature:.1e} is not positive at damping {damping:g}"
                )
            step = size / curvature
            r += step * direction
            residual -= step * image
            size, previous = residual @ residual, size
            direction = residual + size / previous * direction
            steps += 1
        solved.append(r)
    return np.array(solved).reshape(np.shape(targets))


def datainf_shares(
    dots: np.ndarray, squares: np.ndarray, size: int, *, damping: float = 0.1
) -> tuple[np.ndarray, float]:
    """Return one layer's weights of the rows in r, and its λ: r = (v − mean_i share_i · g_i) / λ.

    `dots` (n, j) are <g_i, v_j>, `squares` (n,) ‖g_i‖², `size` the numbers in the layer, d. Returns shares (n, j)
    float64 and λ; both 0 for a layer whose gradients are all zero.
    """
    lam = damping * float(np.mean(squares)) / size
    return (dots / (lam + squares)[:, None], lam) if lam > 0 else (np.zeros_like(dots), 0.0)


def eigenvectors(factor: np.ndarray) -> np.ndarray:
    """Return the eigenvectors (d, d), as columns, of a factor: a sum or mean of outer products (d, d)."""
    return np.linalg.eigh(factor)[1]


def ekfac_solve(
    targets: np.ndarray, q_a: np.ndarray, q_b: np.ndarray, eigenvalues: np.ndarray, *, damping: float | None = None
) -> np.ndarray:
    """Return r (j, out, in) for targets V (j, out, in).

    `q_a` (in, in) and `q_b` (out, out) are the eigenvectors of A and B, `eigenvalues` Λ (out, in); `damping` None: 0.1
    · mean(Λ).
    """
    lam = 0.1 * eigenvalues.mean() if damping is None else damping
    return q_b @ ((q_b.T @ np.asarray(targets, dtype=np.float64) @ q_a) / (eigenvalues + lam)) @ q_a.T
