"""DataInf (arXiv 2310.00902): influence with a closed-form inverse per layer, made for LoRA.

    G_l = (1/n) Σ_i g_li g_liᵀ + λ_l I,     DataInf swaps inverse and mean:
    r_l = (1/n) Σ_i (g_li g_liᵀ + λ_l I)⁻¹ v_l = (1 / (n λ_l)) Σ_i [ v_l − (g_liᵀ v_l) / (λ_l + ‖g_li‖²) · g_li ]
    S(z) = Σ_l <g_l(z), r_l>,     λ_l = 0.1 · (n d_l)⁻¹ Σ_i ‖g_li‖²

g_li: gradient of row i's loss in layer l (d_l numbers); v_l: the target's gradient. Layers are taken as independent.
The paper's influence is −S. λ_l follows the authors' code. The rows i may be a sample of the pool.

The error of the swap grows with d_l; it is exact for n = 1. `benchmarks` and tests hold it against the true inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keepset.features.solvers import datainf_shares
from keepset.methods.gradient import InfluenceFunction, Labels
from keepset.methods.influence import influence
from keepset.stages.influence import Curvature


def datainf_solve(
    targets: Sequence[np.ndarray], gradients: Sequence[np.ndarray], *, damping: float = 0.1
) -> list[np.ndarray]:
    """Return r for each layer; the scores are then dot products with r (`influence.influence`).

    Args:
        targets: per layer (j, d_l), v.
        gradients: per layer (n, d_l), g, of the rows that make up the curvature.
        damping: the factor 0.1 of λ_l.

    Returns:
        per layer (j, d_l) float64.

    Raises:
        ValueError: layers that don't fit, or a layer whose gradients are all zero (λ_l would be 0).
    """
    solved = []
    if len(targets) != len(gradients):
        raise ValueError(f"{len(targets)} layers of targets but {len(gradients)} of gradients")
    for layer, (v, g) in enumerate(zip(targets, gradients, strict=True)):
        v, g = np.asarray(v, dtype=np.float64), np.asarray(g, dtype=np.float64)
        squares = np.einsum("nd,nd->n", g, g)
        shares, lam = datainf_shares(g @ v.T, squares, g.shape[1], damping=damping)
        if not lam > 0:
            raise ValueError(f"datainf: layer {layer} has no gradient, so no damping; leave it out")
        solved.append((v - shares.T @ g / len(g)) / lam)
    return solved


def datainf(
    gradients: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    curvature: Sequence[np.ndarray] | None = None,
    damping: float = 0.1,
) -> np.ndarray:
    """Score rows whose gradients are at hand: (n, j) <g(z_i), r_j>, summed over layers.

    Args:
        gradients: per layer (n, d_l) of the rows to score.
        targets: per layer (j, d_l).
        curvature: per layer (h, d_l) of the rows that make up the curvature; None: the rows themselves.
        damping: the factor of λ_l.
    """
    solved = datainf_solve(targets, gradients if curvature is None else curvature, damping=damping)
    return np.sum([np.asarray(g, np.float64) @ r.T for g, r in zip(gradients, solved, strict=True)], axis=0)


@dataclass(frozen=True)
class DataInf(InfluenceFunction):
    """DataInf's closed form, each LoRA matrix by itself."""

    name = "datainf"
    paper = "DataInf, arXiv 2310.00902"
    formula = "influence, mean of one-row inverses a matrix"
    curvature_rows: int = 200
    labels: Labels = "data"
    damping: float = 0.1
    reduce: Literal["max", "mean"] = "mean"
    seed: int = 0

    @property
    def solver(self) -> Curvature:
        """The mean of one-row inverses."""
        return Curvature("datainf", self.labels, float(self.damping), int(self.curvature_rows), int(self.seed))

    def reduce_dots(self, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `influence`."""
        return influence(dots[0], reduce=self.reduce)
