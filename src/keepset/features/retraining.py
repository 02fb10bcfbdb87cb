"""A utility that really trains: minus the target's loss after fine-tuning a fresh LoRA on some of the rows.

    U(A) = −mean_j mean_{z in j} L(z; θ_A) / T(z),     θ_A: AdamW from the same start on the rows of A

What truncated Monte-Carlo Shapley (`methods/tmc_shapley.py`) asks for, once a set. Constant learning rate, no decay,
rows in an order that hangs on the seed and the set alone; the empty set is the untrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepset.features.losses import row_losses
from keepset.model.pack import Row, pack, plan_batches, supports_packing, token_nll


class Retraining:
    """The utility of sets of rows; one model in memory, put back to its start before every training."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        target: Sequence[Row],
        tasks: np.ndarray,
        *,
        learning_rate: float,
        epochs: float,
        batch_size: int,
        token_budget: int = 1024,
        seed: int = 0,
    ) -> None:
        """Take the model's LoRA as the start.

        The model has a fresh LoRA; `tasks` (m,) are those of the target's rows, `epochs` passes over a set by AdamW.
        """
        self.model, self.rows, self.target, self.tasks = model, rows, target, np.asarray(tasks)
        self.learning_rate, self.epochs, self.batch_size = learning_rate, epochs, batch_size
        self.token_budget, self.seed = token_budget, seed
        self.parameters = [p for n, p in model.named_parameters() if "lora_" in n]
        self.start = [p.detach().clone() for p in self.parameters]

    def __call__(self, indices: np.ndarray) -> float:
        """U of the rows at `indices`, in any order."""
        with torch.no_grad():
            for p, start in zip(self.parameters, self.start, strict=True):
                p.copy_(start)
        if len(indices):
            self.train(np.sort(np.asarray(indices)))
        losses = row_losses(self.model, self.target, token_budget=self.token_budget)
        means = losses.nll[0] / losses.n_tokens
        return -float(np.mean([means[self.tasks == t].mean() for t in np.unique(self.tasks)]))

    def train(self, indices: np.ndarray) -> None:
        """AdamW over the rows at `indices`."""
        for p in self.parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate, weight_decay=0.0)
        rng = np.random.default_rng(self.seed)
        orders = [rng.permutation(indices) for _ in range(int(np.ceil(self.epochs)))]
        stream = np.concatenate(orders)[: max(1, round(self.epochs * len(indices)))]
        for start in range(0, len(stream), self.batch_size):
            self.step([self.rows[i] for i in stream[start : start + self.batch_size]])
            optimizer.step()
            optimizer.zero_grad()

    def step(self, batch: Sequence[Row]) -> None:
        """Add up the gradient of the batch's mean of mean token losses."""
        packed, device = supports_packing(self.model), self.parameters[0].device
        for part in plan_batches([len(r.input_ids) for r in batch], self.token_budget):
            made = pack(batch, part, packed=packed, device=device)
            nll = token_nll(self.model, made)
            counts = torch.bincount(made.row_of, minlength=len(part))
            loss: Tensor = (nll / counts[made.row_of]).sum() / len(batch)
            loss.backward()
