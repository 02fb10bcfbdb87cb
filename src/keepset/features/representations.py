"""Pooled hidden states of the last layer: what RDS, RDS+ and kNN-Shapley compare.

    last           h_L, the last token's state                                    RDS (Xia et al. 2024, LESS baseline)
    weighted_mean  sum_t w_t h_t with w_t = t / sum_s s, t = 1 .. L               RDS+ (Ivison et al. 2025,
    arXiv:2503.01807),
                                                                                  SGPT's position weights
                                                                                  (arXiv:2202.08904)

h_t are the final-normed states of all tokens of the row, prompt included. The official RDS+ code pools over padding
when its batch size exceeds one; here a row's pool reads the row's own positions only, so no batch can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from keepset.memory import in_halves
from keepset.model import pack as packing

Pooling = Literal["last", "weighted_mean"]


def representations(
    model: Any,
    rows: Sequence[packing.Row],
    *,
    token_budget: int,
    pooling: Pooling = "weighted_mean",
) -> np.ndarray:
    """Return one state a row, (n, d) float32, in the order of `rows`.

    Raises:
        ValueError: an unknown pooling.
    """
    if pooling not in ("last", "weighted_mean"):
        raise ValueError(f"pooling '{pooling}' is not one of last, weighted_mean")
    packed = packing.supports_packing(model)
    device = next(model.parameters()).device
    # They stay on the device until the end: reading them back row by row would make a GPU wait.
    states: list[torch.Tensor | None] = [None] * len(rows)
    with torch.inference_mode():

        def pool(index: np.ndarray) -> None:
            batch = packing.pack(rows, index, packed=packed, device=device)
            hidden = packing.last_hidden(model, batch).float()
            if pooling == "last":
                last = np.array([offset + n - 1 for offset, n in zip(batch.offsets, batch.lengths, strict=True)])
                for i, state in zip(index, hidden[packing.on_device(last, device)], strict=True):
                    states[int(i)] = state
                return
            for i, offset, n in zip(index, batch.offsets, batch.lengths, strict=True):
                weight = torch.arange(1, n + 1, device=device, dtype=torch.float32)
                states[int(i)] = (weight / weight.sum()) @ hidden[offset : offset + n]

        lengths, apart = [len(row.input_ids) for row in rows], packing.engine(model).apart
        for index in packing.plan_batches(lengths, token_budget, apart):
            in_halves(index, pool)
    if not rows:
        return np.zeros((0, packing.bare(model).config.get_text_config().hidden_size), dtype=np.float32)
    return torch.stack(states).cpu().numpy()  # type: ignore[arg-type]  # every row stands in one batch
