"""DataInf (arXiv 2310.00902): influence with a closed-form inverse per layer, made for LoRA.

    G_l = (1/n) Σ_i g_li g_liᵀ + λ_l I,     DataInf swaps inverse and mean:
    r_l = (1/n) Σ_i (g_li g_liᵀ + λ_l I)⁻¹ v_l = (1 / (n λ_l)) Σ_i [ v_l − (g_liᵀ v_l) / (λ_l + ‖g_li‖²) · g_li ]
    S(z) = Σ_l <g_l(z), r_l>,     λ_l = 0.1 · (n d_l)⁻¹ Σ_i ‖g_li‖²

g_li: gradient of row i's loss in layer l (d_l numbers); v_l: the target's gradient. Layers are taken as independent.
The paper's influence is −S. λ_l follows the authors' code. The rows i may be a sample of the pool.

The error of the swap grows with d_l; it is exact for n = 1. `benchmarks` and tests hold it against the true inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

from keepset.methods.gradient import Labels
from keepset.methods.influence import InfluenceFunction
from keepset.stages.influence import Curvature


@dataclass(frozen=True)
class DataInf(InfluenceFunction):
    """DataInf's closed form, each LoRA matrix by itself."""

    name = "datainf"
    when = "as `influence`, cheaper, with `cosine: true`; below it in our bank"
    paper = "DataInf, arXiv 2310.00902"
    formula = "influence, mean of one-row inverses a matrix"
    curvature_rows: int = 200
    labels: Labels = "data"
    damping: float = 0.1
    seed: int = 0

    @property
    def solver(self) -> Curvature:
        return Curvature("datainf", self.labels, float(self.damping), int(self.curvature_rows), int(self.seed))
