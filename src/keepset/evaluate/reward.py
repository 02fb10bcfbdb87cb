"""Rewards: the one number that a reward model gives a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def reward_scores(model: Any, rows: Sequence[np.ndarray], *, batch_size: int = 8) -> np.ndarray:
    """Score token rows with a reward model, (n,) float64.

    The model is a sequence classifier with one label; its config names the pad token, by which transformers finds a
    row's last token.
    """
    import torch

    out = np.zeros(len(rows))
    order = np.argsort([-len(r) for r in rows], kind="stable")
    device = next(model.parameters()).device
    pad = int(model.config.get_text_config().pad_token_id)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tensors = [torch.from_numpy(np.asarray(rows[i], dtype=np.int64)) for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(t) for t in tensors])
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            out[chosen] = logits[:, 0].double().cpu().numpy()
    return out
