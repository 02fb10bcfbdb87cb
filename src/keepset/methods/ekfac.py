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

from dataclasses import dataclass
from typing import Literal

from keepset.methods.gradient import Labels
from keepset.methods.influence import InfluenceFunction
from keepset.stages.influence import Curvature


@dataclass(frozen=True)
class Ekfac(InfluenceFunction):
    """Eigenvalue-corrected Kronecker factors of each LoRA matrix; one damping for all of them, or one for each."""

    name = "ekfac"
    when = "as `influence` for larger adapters, with `cosine: true`"
    paper = "EK-FAC, arXiv 2308.03296"
    formula = "influence, eigenvalue-corrected Kronecker factors"
    curvature_rows: int = 200
    labels: Labels = "sampled"
    damping: float = 0.1
    damping_by: Literal["all", "matrix"] = "all"
    seed: int = 0

    @property
    def solver(self) -> Curvature:
        solver = "ekfac-matrix" if self.damping_by == "matrix" else "ekfac"
        return Curvature(solver, self.labels, float(self.damping), int(self.curvature_rows), int(self.seed))
