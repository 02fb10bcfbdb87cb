"""DataInf (arXiv 2310.00902): influence with a closed-form inverse per layer, made for LoRA.

    G_l = (1/n) Σ_i g_li g_liᵀ + λ_l I,     DataInf swaps inverse and mean:
    r_l = (1/n) Σ_i (g_li g_liᵀ + λ_l I)⁻¹ v_l = (1 / (n λ_l)) Σ_i [ v_l − (g_liᵀ v_l) / (λ_l + ‖g_li‖²) · g_li ]
    S(z) = Σ_l <g_l(z), r_l>,     λ_l = 0.1 · (n d_l)⁻¹ Σ_i ‖g_li‖²

g_li: gradient of row i's loss in layer l (d_l numbers); v_l: the target's gradient. Layers are taken as independent.
The paper's influence is −S. λ_l follows the authors' code. The rows i may be a sample of the pool.

The error of the swap grows with d_l; it is exact for n = 1. `benchmarks` and tests hold it against the true inverse.
"""

from __future__ import annotations

import numpy as np


def datainf_shares(
    dots: np.ndarray, squares: np.ndarray, size: int, *, damping: float = 0.1
) -> tuple[np.ndarray, float]:
    """Return one layer's weights of the rows in r, and its λ: r = (v − mean_i share_i · g_i) / λ.

    Args:
        dots: (n, j) <g_i, v_j>.
        squares: (n,) ‖g_i‖².
        size: numbers in the layer, d.
        damping: the factor 0.1 of λ.

    Returns:
        shares (n, j) float64 and λ; both 0 for a layer whose gradients are all zero.
    """
    lam = damping * float(np.mean(squares)) / size
    return (dots / (lam + squares)[:, None], lam) if lam > 0 else (np.zeros_like(dots), 0.0)
