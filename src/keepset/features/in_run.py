"""One step of in-run data Shapley (arXiv 2406.11011): the rows' values, then plain SGD on their mean loss.

    dots_ij = <v_j, g_i> / b,   curvature_ij = g_iᵀ H_j u / b,   u = Σ_{batch} g_i / b,   θ ← θ − η·u

g_i: gradient of row i's mean token loss on the LoRA matrices; v_j and H_j: gradient and Hessian of task j's loss (mean
over its rows of their mean token loss). Hessian times u is the central difference of v at θ ± εu, with ε·‖u‖ 1/200 of
‖θ‖: relative error near 1e-3 in float32. A batch's gradients are held whole: rows x parameters x 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keepset.features.row_gradients import stacked_gradients, weighted_gradients
from keepset.model.pack import Row

REACH = 5e-3
"""Length of the difference step over ‖θ‖."""


@dataclass(frozen=True)
class Step:
    """What one step tells of its batch.

    Attributes:
        dots: (b, j) float64.
        curvature: (b, j) float64; None to first order.
        norms: (b,) lengths of the rows' gradients.
    """

    dots: np.ndarray
    curvature: np.ndarray | None
    norms: np.ndarray


def task_weights(tasks: np.ndarray, n_tasks: int) -> np.ndarray:
    """(m, j): 1 / rows of the task for its own rows, else 0."""
    own = np.asarray(tasks)[:, None] == np.arange(n_tasks)
    return own / np.maximum(own.sum(axis=0), 1)


@torch.no_grad()
def in_run_step(
    model: nn.Module,
    batch: Sequence[Row],
    target: Sequence[Row],
    weights: np.ndarray,
    *,
    learning_rate: float,
    second_order: bool = False,
    token_budget: int = 1024,
) -> Step:
    """Value a batch's rows and take the step.

    The model's LoRA is moved; weights (m, j) are of `task_weights`; `second_order` takes two more passes over the
    target.
    """
    options: dict[str, Any] = {"token_budget": token_budget}
    parameters = dict(model.named_parameters())
    v = weighted_gradients(model, target, weights, **options)
    g = stacked_gradients(model, batch, **options)
    mean = {n: x.mean(0).view(parameters[n].shape) for n, x in g.items()}
    curvature = None
    if second_order:
        size = float(torch.stack([parameters[n].norm() for n in mean]).norm())
        length = float(torch.stack([u.norm() for u in mean.values()]).norm())
        if length > 0:
            epsilon = REACH * size / length
            start = {n: parameters[n].clone() for n in mean}
            sides = []
            try:
                for sign in (1.0, -1.0):
                    for n, u in mean.items():
                        parameters[n].copy_(start[n] + sign * epsilon * u)
                    sides.append(weighted_gradients(model, target, weights, **options))
            finally:
                for n, p in start.items():
                    parameters[n].copy_(p)
            hu = {n: (sides[0][n] - sides[1][n]) / (2 * epsilon) for n in mean}
            curvature = products_of(g, hu) / len(batch)
        else:
            curvature = np.zeros((len(batch), weights.shape[1]))
    for n, u in mean.items():
        parameters[n].sub_(learning_rate * u)
    squares = torch.stack([x.double().square().sum(dim=1) for x in g.values()]).sum(dim=0)
    return Step(products_of(g, v) / len(batch), curvature, squares.sqrt().cpu().numpy())


def products_of(g: dict[str, Tensor], v: dict[str, Tensor]) -> np.ndarray:
    """(n, j) float64 inner products of gradients (n, a·b) with vectors (j, a, b), over all parameters."""
    products = sum((x @ v[n].flatten(1).T).double() for n, x in g.items())
    assert isinstance(products, Tensor)
    return products.cpu().numpy()
