"""Products of the Gauss-Newton matrix of some rows' mean token losses with a direction of the LoRA, never the matrix.

    G u = (1/n) Σ_i (1/T_i) Σ_t J_itᵀ (diag(p_it) − p_it p_itᵀ) J_it u

J: derivative of the logits by the LoRA's numbers; p: softmax of the logits. J u is the central difference of the hidden
states at θ ± εu, with ε·‖u‖ 1/200 of ‖θ‖, times the head; its transpose is an ordinary backward pass. What conjugate
gradients (`methods/influence.py`) ask for; a product costs two forward passes and one forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepset.errors import ModelError
from keepset.features.in_run import REACH
from keepset.model import head
from keepset.model import pack as packing
from keepset.model.pack import Row


class GaussNewton:
    """G of some rows at a model's present LoRA, as a function of flat float64 vectors (p,), in the order of `names`."""

    def __init__(
        self, model: Any, rows: Sequence[Row], names: Sequence[str], *, token_budget: int, damping: float = 0.0
    ) -> None:
        """Prepare the batches.

        `names` are the LoRA parameters that count, in the vectors' order; λ = `damping` is added to every product.
        """
        self.model, self.damping = model, damping
        parameters = dict(model.named_parameters())
        self.parameters = [parameters[n] for n in names]
        packed, device = packing.supports_packing(model), self.parameters[0].device
        plans = packing.plan_batches([len(r.input_ids) for r in rows], token_budget)
        self.batches = [packing.pack(rows, plan, packed=packed, device=device) for plan in plans]
        self.n_rows = len(rows)
        inner = packing.bare(model)
        if packing.engine(model).head != "linear":
            raise ModelError("Gauss-Newton products need a plain linear head; this model changes its logits")
        self.head, self.mapping = inner.get_output_embeddings(), head.logit_map(inner.config)

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """G u + λ u."""
        shaped = self.unflatten(u)
        length = float(np.linalg.norm(u))
        if length == 0:
            return np.zeros_like(u)
        size = float(torch.stack([p.detach().norm() for p in self.parameters]).norm())
        epsilon = REACH * size / length
        sides = [self.hidden_at(shaped, sign * epsilon) for sign in (1.0, -1.0)]
        total = [torch.zeros_like(p) for p in self.parameters]
        before = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(True)
        try:
            for batch, plus, minus in zip(self.batches, *sides, strict=True):
                with torch.enable_grad():
                    hidden = packing.last_hidden(self.model, batch)[batch.predict]
                back = self.through_head(hidden.detach(), (plus - minus) / (2 * epsilon), batch)
                for t, g in zip(total, torch.autograd.grad(hidden, self.parameters, back), strict=True):
                    t += g
        finally:
            for p, flag in zip(self.parameters, before, strict=True):
                p.requires_grad_(flag)
        return torch.cat([t.flatten() for t in total]).double().cpu().numpy() / self.n_rows + self.damping * u

    @torch.no_grad()
    def hidden_at(self, direction: list[Tensor], step: float) -> list[Tensor]:
        """Predicting hidden states (S, d) of every batch at θ + step · direction; θ is put back."""
        start = [p.detach().clone() for p in self.parameters]
        try:
            for p, d in zip(self.parameters, direction, strict=True):
                p.add_(d, alpha=step)
            return [packing.last_hidden(self.model, batch)[batch.predict] for batch in self.batches]
        finally:
            for p, s in zip(self.parameters, start, strict=True):
                p.copy_(s)

    @torch.no_grad()
    def through_head(self, hidden: Tensor, tangent: Tensor, batch: packing.Batch) -> Tensor:
        """(S, d): tangent through the head, the softmax's covariance, and back, each token weighted by 1 / T."""
        counts = torch.bincount(batch.row_of, minlength=self.n_rows)
        weights = 1.0 / counts[batch.row_of]
        out, step = torch.empty_like(hidden), max(16, (1 << 22) // self.head.weight.shape[0])
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            z = self.mapping(self.head(hidden[part]))
            p = z.softmax(1)
            dz = self.mapping.backward(z, tangent[part] @ self.head.weight.T)
            dz = p * (dz - (p * dz).sum(1, keepdim=True)) * weights[part, None]
            out[part] = self.mapping.backward(z, dz) @ self.head.weight
        return out

    def unflatten(self, u: np.ndarray) -> list[Tensor]:
        """Parameter-shaped pieces of a flat vector."""
        first = self.parameters[0]
        flat = torch.as_tensor(u, dtype=first.dtype, device=first.device)
        return [piece.view(p.shape) for piece, p in zip(flat.split([p.numel() for p in self.parameters]),
                                                        self.parameters, strict=True)]  # fmt: skip
