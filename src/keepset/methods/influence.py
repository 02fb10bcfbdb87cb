"""Influence functions (arXiv 1703.04730): the effect on the target's loss of training a little more on a row.

    S_j(z) = v_jᵀ (H + λ I)⁻¹ ∇ℓ(z),     v_j = gradient of target j's loss

H: Hessian (or Gauss-Newton) of the training loss at θ, the mean over rows. The paper's influence of up-weighting z on
the target loss is −S: a large S means that z lowers it. λ (damping) keeps the solve sane where H is singular or
indefinite.

H is symmetric, so the solve is done once per target, never per row: r_j = (H + λ I)⁻¹ v_j goes where v_j went, and
the scores are the dot products <∇ℓ(z), r_j>. All solvers here (and in `datainf.py`, `ekfac.py`) turn targets (j, p)
into such r.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keepset.methods.tasks import Reduce, reduce_tasks


def influence(dots: np.ndarray, *, reduce: Reduce = "mean") -> tuple[np.ndarray, np.ndarray]:
    """Reduce dots (n, j) = <∇ℓ(z_i), r_j> to scores (n,); per task (n, j) beside them.

    Args:
        dots: inner products with the solved targets.
        reduce: over targets; "mean" = the influence on the mean target loss.
    """
    per_task = np.asarray(dots, dtype=np.float64)
    return reduce_tasks(per_task, reduce), per_task


def fisher_coefficients(gram: np.ndarray, dots: np.ndarray, *, damping: float) -> np.ndarray:
    """Solve with F = (1/h) Σ g gᵀ of h rows by h × h matrices alone, never a p × p one (Woodbury's identity).

        (F + λI)⁻¹ v = (v − Σ_i c_i g_i) / λ,     c = (G Gᵀ + hλI)⁻¹ G v

    Args:
        gram: (h, h) G Gᵀ, inner products of the rows' gradients.
        dots: (h, j) G v of each target.
        damping: λ, above 0.

    Returns:
        c (h, j) float64.
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

    Args:
        product: maps a vector (p,) to H times it, (p,).
        targets: (j, p).
        damping: λ.
        tolerance: stop when the residual's norm is below this share of the target's.
        max_steps: products spent on a target.

    Returns:
        (j, p) float64.

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
