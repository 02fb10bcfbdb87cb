"""The obvious twin of the gradient engine: one row at a time, full logits, plain autograd over named parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conftest import TinyRow, random_rows
from keepset.features.adam import AdamState
from keepset.features.targets import GradientTarget, target_vectors


def token_logps(model: Any, row: Any) -> Tensor:
    """(S,) log-probabilities of the supervised tokens, by the model's own forward."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(row.supervised[1:])]


def gradient(model: Any, names: list[str], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradient of a scalar with respect to the named parameters."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[n] for n in names]
    flags = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), chosen)
    for p, flag in zip(chosen, flags, strict=True):
        p.requires_grad_(flag)
    return dict(zip(names, found, strict=True))


def mean_nll_gradient(model: Any, names: list[str], row: Any) -> dict[str, Tensor]:
    return gradient(model, names, lambda: -token_logps(model, row).mean())


def random_state(shapes: dict[str, tuple[int, int]], *, seed: int = 0, step: int = 7) -> AdamState:
    """Moments of the size LoRA gradients of the tiny models have."""
    generator = torch.Generator().manual_seed(seed)
    m = {n: torch.randn(s, generator=generator) * 1e-2 for n, s in shapes.items()}
    v = {n: torch.rand(s, generator=generator) * 1e-3 + 1e-6 for n, s in shapes.items()}
    return AdamState(m, v, step)


def flat(blocks: dict[str, Tensor]) -> np.ndarray:
    """One float64 vector, parameters in the order given."""
    return np.concatenate([b.detach().double().reshape(-1).numpy() for b in blocks.values()])


def one_by_one(model: Any, rows: list[TinyRow]) -> np.ndarray:
    """The obvious way: `model(input_ids, labels=...)` on single rows, times the number of labels."""
    sums = []
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(row.supervised), ids, -100)
        with torch.no_grad():
            sums.append(model(input_ids=ids, labels=labels).loss.item() * row.supervised[1:].sum())
    return np.asarray(sums)


def some_target(peft, seed=11, **options) -> GradientTarget:
    rows = random_rows(8, seed=seed)
    pairs = [(rows[2 * i], rows[2 * i + 1]) for i in range(4)]
    return target_vectors(peft, pairs, np.array([0, 1, 0, 2]), **options)


def shapes_of(target):
    return {n: tuple(b.shape[1:]) for n, b in target.blocks.items()}
