"""Projected gradients: what `gradient_store.py` keeps of each row, and the targets on the same side.

Each mapped gradient Γ (p numbers) is sketched to k numbers after the map (Charikar et al. 2002, the count sketch):

    S[b] = Σ_{i: h(i) = b} s(i)·Γ_i,   h(i) in 0..k−1 and s(i) = ±1 hashed from (seed, parameter name, i)

E⟨S(a), S(b)⟩ = ⟨a, b⟩ and the standard deviation of the cosine is at most about √(2/k), √(1/k) between nearly
orthogonal vectors: that of a dense Rademacher projection (LESS, TRAK), at a cost per row that does not depend on k. The
matrix is never stored; any slice of it comes from the hash, integer arithmetic that is the same on CPU and GPU.

The Adam maps add one vector to every row (Γ of a zero gradient); c, its direction, is left out of both sides before the
sketch and put back exactly, so that it costs no accuracy: with a⊥ = a − ⟨a, c⟩·c,

    ⟨Γ, v⟩ ≈ ⟨Γ, c⟩·⟨v, c⟩ + ⟨S(Γ⊥), S(v⊥)⟩     error √(1/k)·‖Γ⊥‖·‖v⊥‖
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keepset.errors import RecipeError
from keepset.features.adam import AdamState, momentum_direction, parameter_map
from keepset.features.sketch import Sketch
from keepset.features.targets import GradientTarget


def dimension_for(error: float) -> int:
    """Sketch size at which a cosine near 0 has standard deviation `error`: k = 1 / error², up to a multiple of 64.

    Raises:
        RecipeError: error not in (0, 1).
    """
    if not 0 < error < 1:
        raise RecipeError(f"projection error {error}: must lie between 0 and 1")
    return math.ceil(1 / error**2 / 64) * 64


@dataclass(frozen=True)
class ProjectedTarget:
    """Target vectors as a store takes them.

    Attributes:
        sketches: (j, k) float32, S(v⊥).
        shared: (j,) float64, exact ⟨v, c⟩.
    """

    sketches: np.ndarray
    shared: np.ndarray


@dataclass(frozen=True)
class StoreError:
    """How far a store's cosines are from the exact ones on a sample.

    Attributes:
        rms: root mean square error of the cosines.
        spearman: (j,) rank correlation with the exact cosines.
    """

    rms: float
    spearman: np.ndarray


def shared_direction(kind: str, adam: AdamState | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The unit vector c along which a map moves every row, by parameter (p,); empty for a map without one."""
    directions = {n: momentum_direction(parameter_map(kind, adam, n, s, "cpu")) for n, s in shapes.items()}
    blocks = {n: d for n, d in directions.items() if d is not None}
    length = math.sqrt(sum(float(d.double().square().sum()) for d in blocks.values()))
    return {n: d / length for n, d in blocks.items()} if length > 0 else {}


def project(sketch: Sketch, blocks: Mapping[str, Tensor], n: int) -> np.ndarray:
    """Sketch n vectors given by parameter, (n, ...) each; (n, k) float32."""
    out = torch.zeros(n, sketch.dim)
    for name, block in blocks.items():
        sketch.add_(out, name, block.reshape(n, -1).float().cpu(), 0)
    return out.numpy()


def project_target(
    sketch: Sketch, target: GradientTarget, *, map: str = "sgd", adam: AdamState | None = None
) -> ProjectedTarget:
    """Sketch every target vector, without the direction that the map gives to all rows."""
    sketches = project(sketch, target.blocks, target.n_targets)
    shapes = {n: tuple(b.shape[1:]) for n, b in target.blocks.items()}
    common = shared_direction(map, adam, shapes)
    shared = np.zeros(target.n_targets)
    for name, c in common.items():
        shared += (target.blocks[name].flatten(1).cpu().double() @ c.double()).numpy()
    if common:
        sketches = sketches - np.outer(shared, project(sketch, common, 1)[0]).astype(np.float32)
    return ProjectedTarget(sketches, shared)


def store_error(estimated: np.ndarray, exact: np.ndarray, norms: np.ndarray, lengths: np.ndarray) -> StoreError:
    """Compare a store's dots (n, j) with exact ones on the same rows; `norms` (n,) are ‖Γ‖, `lengths` (j,) ‖v_j‖."""
    from scipy.stats import spearmanr

    error = (estimated - exact) / (norms[:, None] * lengths)
    ranks = [float(spearmanr(estimated[:, k] / norms, exact[:, k] / norms).statistic) for k in range(exact.shape[1])]
    return StoreError(float(np.sqrt(np.mean(error**2))), np.array(ranks))


def target_lengths(target: GradientTarget) -> np.ndarray:
    """‖v_j‖, (j,)."""
    squares = torch.stack([b.flatten(1).double().square().sum(1) for b in target.blocks.values()]).sum(0)
    return squares.sqrt().cpu().numpy()
