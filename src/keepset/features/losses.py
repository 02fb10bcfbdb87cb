"""Summed losses of every row under the base and its LoRA, in one sweep: what DavIR, RHO, IFD and perplexity start from.

L_i = sum over supervised t of l(z_t, y_t), in nats, token values in float32 and sums in float64. The token loss l is
one of

    ce              nll = logsumexp(z) - z_y
    label-smoothed  (1 - e) * nll + e * (logsumexp(z) - mean(z))    e = 0.1  (Szegedy et al. 2016; as torch has it)
    focal           (1 - p_y)^g * nll,  p_y = exp(-nll)             g = 2    (Lin et al. 2017, eq. 4)
    error-norm      ||softmax(z) - onehot(y)||_2: no loss, but what EL2N sums  (Paul et al. 2021, arXiv:2107.07075)
    entropy         nll, and beside it the prediction's entropy -sum_v p_v log p_v, from the same pass

`keepset.model.passes` runs the rows; the output head runs at supervised positions only, over blocks of the vocabulary.
Two separate full models are two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from keepset.memory import in_halves
from keepset.model import head
from keepset.model import pack as packing
from keepset.model.passes import EVERY, Passes, Shortcuts

TokenLoss = Literal["ce", "label-smoothed", "focal", "error-norm", "entropy"]
SMOOTHING, GAMMA = 0.1, 2.0


@dataclass(frozen=True)
class RowLosses:
    """Losses in the order of the given rows.

    Attributes:
        nll: (passes, n) float64, summed nats per row; one pass for each of `adapters`.
        n_tokens: (n,) int64 supervised tokens.
        token_nll: per pass a list of n arrays (n_tokens[i],) float32, if asked for.
        entropy: (passes, n) float64, summed nats per row, with `token_loss="entropy"`.
    """

    nll: np.ndarray
    n_tokens: np.ndarray
    token_nll: list[list[np.ndarray]] | None = None
    entropy: np.ndarray | None = None

    def columns(self, k: int) -> dict[str, np.ndarray]:
        """What pass k gave, (n,) each, by name."""
        more = {} if self.entropy is None else {"entropy": self.entropy[k]}
        return {"nll": self.nll[k], "n_tokens": self.n_tokens, **more}


def row_losses(
    model: Any,
    rows: Sequence[packing.Row],
    *,
    token_budget: int,
    adapters: tuple[bool, ...] = (True,),
    token_loss: TokenLoss = "ce",
    per_token: bool = False,
    shortcuts: Shortcuts = EVERY,
) -> RowLosses:
    """Score rows under one model, with its adapter on and / or off.

    Args:
        model: causal LM, or PeftModel around one.
        rows: encoded rows.
        token_budget: tokens a batch holds.
        adapters: the passes over each batch, see `Passes`.
        token_loss: see the module docstring.
        per_token: also return every token's loss.
        shortcuts: see `Passes`.

    Returns:
        Losses in the order of `rows`. A row whose loss is not finite keeps its NaN or Inf: the caller quarantines it.
    """
    n_tokens = np.asarray([int(np.count_nonzero(row.supervised)) for row in rows], dtype=np.int64)
    # Results stay on the device until the end: reading them back after every batch would make a GPU wait.
    done: list[tuple[int, np.ndarray, Tensor, Tensor | None]] = []
    passes = Passes(model, rows, adapters, shortcuts)
    with torch.inference_mode():
        for index, prefix in passes.batches(token_budget):

            def score(index: np.ndarray, prefix: int = prefix) -> None:
                batch, values = passes.run(index, prefix, lambda h, y: token_values(model, h, y, token_loss))
                for k, columns in enumerate(values):
                    sums = torch.stack([packing.row_sums(c, batch.row_of, len(index)) for c in columns])
                    done.append((k, index, sums, columns[0] if per_token else None))

            in_halves(index, score)
    sums_of = np.zeros((2, len(adapters), len(rows)))
    tokens: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] * len(rows) for _ in adapters]
    for k, index, sums, kept in done:
        sums_of[: len(sums), k, index] = sums.cpu().numpy()
        if kept is not None:
            parts = np.split(kept.float().cpu().numpy(), np.cumsum(n_tokens[index])[:-1])
            for i, part in zip(index, parts, strict=True):
                tokens[k][int(i)] = part
    entropy = sums_of[1] if token_loss == "entropy" else None
    return RowLosses(sums_of[0], n_tokens, tokens if per_token else None, entropy)


def token_values(model: Any, hidden: Tensor, labels: Tensor, token_loss: TokenLoss) -> Tensor:
    """Return the loss of each label, (1, S) float32, from the final hidden states (S, d) that predict it; no gradient.

    With `entropy`, (2, S): the loss and the entropy.
    """
    if token_loss == "ce":
        return packing.nll_at(model, hidden, labels)[None]
    if token_loss == "focal":
        nll = packing.nll_at(model, hidden, labels)
        return ((1 - torch.exp(-nll)) ** GAMMA * nll)[None]
    if token_loss not in ("label-smoothed", "error-norm", "entropy"):
        raise ValueError(f"token_loss '{token_loss}' is not one of {', '.join(get_args(TokenLoss))}")
    inner = packing.bare(model)
    z, mapping = inner.get_output_embeddings(), head.logit_map(inner.config)
    if packing.engine(model).head == "linear" and type(z) is nn.Linear:
        stats = head.head_stats(
            hidden, labels, z.weight, z.bias, mapping, with_mean=token_loss == "label-smoothed",
            with_squares=token_loss == "error-norm", with_entropy=token_loss == "entropy",
        )  # fmt: skip
    else:
        size = head.CHUNK // packing.vocabulary(model)
        stats = head.stats_of_logits(lambda h: packing.own_logits(model, h), hidden, labels, size)
    if token_loss == "error-norm":
        return stats.error_norm[None]
    nll = stats.lse - stats.label
    if token_loss == "entropy":
        return torch.stack([nll, stats.entropy])
    return ((1 - SMOOTHING) * nll + SMOOTHING * (stats.lse - stats.mean))[None]
