"""Whole per-row gradients, one parameter and one batch at a time: for what a dot product with a fixed vector can't say.

`influence.py` never forms them at full size; here a visitor sees each parameter's gradients (n, a, b) of a batch once
and reduces them. Where labels are drawn from the model, their mean outer product is an estimate of the Gauss-Newton
matrix (Fisher information) without bias; with the data's own labels it is the empirical Fisher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from keepset.features.gradients import mean_weights, recording, run_rows
from keepset.features.recorded import Recorder, Sink, products
from keepset.model.layout import Places
from keepset.model.pack import Row, engine, on_device, plan_batches

Labels = Literal["sampled", "data"]
Visit = Callable[[str, np.ndarray, Tensor], None]
"""Takes a parameter's name, the batch's positions in `rows` (n,) and their mean token losses' gradients (n, a, b)."""


def each_gradient(
    model: nn.Module,
    rows: Sequence[Row],
    visit: Visit,
    *,
    token_budget: int = 1024,
    labels: Labels = "data",
    seed: int = 0,
    last_layers: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Show a visitor every row's gradient, and return the parameters' shapes in the model's order.

    `visit` is called once a parameter and batch; the tensor is its own to keep. Sampled labels hang on the row's tokens
    and the seed. `token_budget` changes the time, not the numbers.
    """

    def sink_of(indices: np.ndarray) -> Sink:
        def sink(name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
            out = torch.empty(len(indices), left.shape[1], right.shape[1], device=left.device)
            visit(name, indices, products(left, right, places, out).mul_(scale))

        return sink

    return run_batches(
        model, rows, sink_of, token_budget=token_budget, labels=labels, seed=seed, last_layers=last_layers
    )


def run_batches(
    model: nn.Module,
    rows: Sequence[Row],
    sink_of: Callable[[np.ndarray], Sink],
    *,
    token_budget: int,
    labels: Labels = "data",
    seed: int = 0,
    last_layers: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Run every row's mean token loss back, batch by batch, into the sink that `sink_of(positions)` gives."""
    with recording(model, last_layers=last_layers) as recorder:
        for indices in plan_batches([len(r.input_ids) for r in rows], token_budget, engine(model).apart):
            batch = [rows[i] for i in indices]
            run_rows(model, recorder, batch, mean_weights, sink_of(indices), draws(recorder, batch, labels, seed))
        return recorder.shapes


def draws(recorder: Recorder, rows: Sequence[Row], labels: Labels, seed: int) -> Tensor | None:
    """(S,) uniform numbers for the rows' supervised tokens, each row's own whatever the batch; None for `data`."""
    if labels == "data":
        return None
    return on_device(np.concatenate([uniform(row, seed) for row in rows]), recorder.anchor.device)


def uniform(row: Row, seed: int) -> np.ndarray:
    """(T,) float64 in [0, 1), by the row's tokens and the seed."""
    key = hashlib.sha256(f"{seed}:".encode() + np.asarray(row.input_ids, dtype=np.int64).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(key[:8], "little")).random(int(np.count_nonzero(row.supervised)))


def weighted_gradients(
    model: nn.Module, rows: Sequence[Row], weights: dict[str, np.ndarray] | np.ndarray, **options: Any
) -> dict[str, Tensor]:
    """Σ_i weight_ij · g_i for every column j, nothing else held.

    Returns parameter name to (j, a, b) float32.
    """
    sums: dict[str, Tensor] = {}

    def visit(name: str, indices: np.ndarray, g: Tensor) -> None:
        own = weights[name] if isinstance(weights, dict) else weights
        w = on_device(own[indices].T.astype(np.float32), g.device)
        part = torch.einsum("jn,nab->jab", w, g)
        sums[name] = sums[name].add_(part) if name in sums else part

    shapes = each_gradient(model, rows, visit, **options)
    return {name: sums[name] for name in shapes}


def stacked_gradients(model: nn.Module, rows: Sequence[Row], **options: Any) -> dict[str, Tensor]:
    """Every row's gradient, parameter name to (n, a·b) float32: n · p numbers, and the caller checks that they fit."""
    kept: dict[str, Tensor] = {}

    def visit(name: str, indices: np.ndarray, g: Tensor) -> None:
        if name not in kept:
            kept[name] = torch.empty(len(rows), g[0].numel(), device=g.device)
        kept[name][on_device(indices, g.device)] = g.flatten(1)

    shapes = each_gradient(model, rows, visit, **options)
    return {name: kept[name] for name in shapes}
