"""Gradients of one row by autograd through a model's own forward pass: what the engine's are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keepset.errors import ModelError
from keepset.model import pack as packing
from keepset.model.probes import Probe, name_of, own_logits, tolerance


def own_gradient(model: Any, row: Probe, names: Sequence[str]) -> list[Tensor]:
    """The gradient of a row's mean token loss by autograd through the model's own forward pass, one tensor a name."""
    inner = packing.bare(model)
    chosen = [model.get_parameter(name) for name in names]
    before = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = own_logits(inner, row.input_ids)[row.prompt - 1 : -1]
            labels = torch.as_tensor(row.input_ids[row.prompt :], dtype=torch.long, device=logits.device)
            loss = nn.functional.cross_entropy(logits, labels)
            if not loss.requires_grad:
                raise ModelError(f"{name_of(inner)}: its own forward pass gives no gradient of {names[0]}")
            return list(torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True))
    finally:
        for p, flag in zip(chosen, before, strict=True):
            p.requires_grad_(flag)


def unlike(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Names whose gradients differ by more than rounding, relative to their own length and a tenth of the whole."""
    whole = float(torch.stack([w.float().norm() for w in want.values()]).norm())

    def far(name: str) -> bool:
        w, g = want[name].float(), got.get(name)
        if g is None or g.shape != w.shape:
            return True
        return not float((g.float() - w).norm()) <= tolerance(dtype) * (float(w.norm()) + 0.1 * whole)

    return [name for name in want if far(name)]
