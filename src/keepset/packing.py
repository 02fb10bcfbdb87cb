"""What runs together: batches under a token budget, packed rows, hidden states, token losses.

`plan_batches` is a pure function of the lengths, so batches (and with them every bit of the result) do not depend on
workers or resume points. A packed batch is one sequence of T = sum of lengths without padding; positions restart in
every row and attention stays inside it (`keepset.attention`). The output head runs at supervised positions only
(`keepset.head`).

A model whose attention can't be served that way takes the padded path: right padding, an attention mask made from the
lengths (never from a pad id: for many models pad = eos), the same numbers to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from keepset import attention, head
from keepset.errors import ModelError

log = logging.getLogger(__name__)

PACKABLE = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2"],
)
"""model_type of the architectures tested packed; another one is probed when its model is loaded (`probe`)."""


class Row(Protocol):
    """What packing needs of a row: `keepset.encoding.Encoded` has it."""

    @property
    def input_ids(self) -> np.ndarray:
        """(L,) integer token ids."""

    @property
    def supervised(self) -> np.ndarray:
        """(L,) bool: the prediction of input_ids[t], made at t-1, counts. supervised[0] is False."""


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: (n,) positions in the caller's list.
        input_ids: (B, T) int64. Packed: B = 1, T = prefix + sum of lengths. Padded: B = n, right padding.
        position_ids: (B, T) int64, restarting in every row.
        attention_mask: (B, T) int64 when padded, else None.
        lengths: tokens of each row (without the shared prefix, if there is one).
        offsets: row r occupies flat positions offsets[r] : offsets[r] + lengths[r] of the flattened (B*T).
        predict: (S,) int64 flat positions whose next token is supervised, in row order.
        labels: (S,) int64, that next token.
        row_of: (S,) int64 in 0..n-1.
        segments: the division attention keeps to; None when padded.
    """

    rows: np.ndarray
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    lengths: list[int]
    offsets: list[int]
    predict: Tensor
    labels: Tensor
    row_of: Tensor
    segments: attention.Segments | None = None

    @property
    def prefix(self) -> int:
        """Length of the beginning all rows share, computed once at flat positions 0 : prefix."""
        return self.segments.prefix if self.segments is not None else 0


def needed(row: Row) -> int:
    """Tokens a row must be run for: those before its last supervised one, which is predicted and predicts nothing."""
    supervised = np.flatnonzero(row.supervised)
    return int(supervised[-1]) if len(supervised) else len(row.input_ids)


def plan_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Sort by length (ties by position) and fill batches greedily up to `token_budget` tokens.

    Every row stands in exactly one batch; a row longer than the budget gets its own. Longest first: memory trouble
    shows at once, and a progress bar's estimate errs on the safe side.

    Args:
        lengths: (n,) tokens of each row.
        token_budget: most tokens a batch holds.

    Returns:
        Arrays of positions in `lengths`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches: list[np.ndarray] = []
    start, total = 0, 0
    for i, size in enumerate(sizes[order]):
        if i > start and total + size > token_budget:
            batches.append(order[start:i])
            start, total = i, 0
        total += int(size)
    if len(order) > start:
        batches.append(order[start:])
    return batches


def pack(
    rows: Sequence[Row],
    indices: Sequence[int] | np.ndarray,
    *,
    packed: bool,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
    prefix: int = 0,
    trim: bool = False,
) -> Batch:
    """Build one batch of `rows[i] for i in indices`.

    Args:
        rows: the caller's rows.
        indices: which of them, in the order they are to stand.
        packed: one long sequence, else right padding.
        pad_token_id: what stands in padding; never read by attention.
        device: where the tensors go.
        prefix: packed only: the first `prefix` tokens are the same in every row, unsupervised, and computed once.
        trim: leave out what predicts nothing: a row's last supervised token and all after it (see `needed`).
    """
    index = np.asarray(indices, dtype=np.int64)
    chosen = [rows[int(i)] for i in index]
    full = [needed(row) if trim else len(row.input_ids) for row in chosen]
    lengths = [n - prefix for n in full]
    ids = np.concatenate(
        [np.asarray(row.input_ids[prefix:n], dtype=np.int64) for row, n in zip(chosen, full, strict=True)]
    )
    places = np.concatenate([np.arange(prefix, n) for n in full])
    predict, labels, row_of = [], [], []
    if packed:
        if prefix:
            ids = np.concatenate([np.asarray(chosen[0].input_ids[:prefix], dtype=np.int64), ids])
            places = np.concatenate([np.arange(prefix), places])
        offsets = (prefix + np.concatenate([[0], np.cumsum(lengths[:-1])])).astype(np.int64).tolist()
        shape, mask = (1, len(ids)), None
    else:
        if prefix:
            raise ValueError("a shared prefix needs a packed batch")
        width = max(full)
        offsets = (np.arange(len(full)) * width).tolist()
        shape = (len(full), width)
        real = np.arange(width)[None, :] < np.asarray(full)[:, None]
        flat_ids = np.full(shape, pad_token_id, dtype=np.int64)
        flat_ids[real] = ids
        ids, places = flat_ids, np.broadcast_to(np.arange(width), shape)
        mask = real.astype(np.int64)
    for r, (row, offset) in enumerate(zip(chosen, offsets, strict=True)):
        t = np.flatnonzero(row.supervised)
        # The token at t is predicted from t - 1; just after a shared prefix that is the prefix's own last position.
        predict.append(np.where(t == prefix, prefix - 1, offset + t - prefix - 1) if prefix else offset + t - 1)
        labels.append(np.asarray(row.input_ids)[t])
        row_of.append(np.full(len(t), r))

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(x, dtype=np.int64, order="C")).to(device, non_blocking=True)

    return Batch(
        rows=index,
        input_ids=tensor(ids.reshape(shape)),
        position_ids=tensor(places.reshape(shape)),
        attention_mask=None if mask is None else tensor(mask),
        lengths=lengths,
        offsets=offsets,
        predict=tensor(np.concatenate(predict)),
        labels=tensor(np.concatenate(labels)),
        row_of=tensor(np.concatenate(row_of)),
        segments=attention.Segments.of(lengths, prefix) if packed else None,
    )


def bare(model: Any) -> Any:
    """Return the transformers model inside a PeftModel (its layers still hold the adapter), or the model itself.

    Raises:
        ModelError: an adapter that works by virtual prompt tokens: it needs PEFT's own forward.
    """
    if hasattr(model, "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError("prompt-learning adapters (prompt, prefix or p-tuning) can't be scored; use LoRA")
        return model.get_base_model()
    return model


def supports_packing(model: Any) -> bool:
    """Say whether `last_hidden` may be given packed batches: keepset's attention is set and the architecture served."""
    inner = bare(model)
    if getattr(inner.config, "_attn_implementation", None) != attention.NAME:
        return False
    text = inner.config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) or getattr(text, "attn_logit_softcapping", None):
        return False
    return text.model_type in PACKABLE or bool(getattr(inner, "keepset_probed", False))


def last_hidden(model: Any, batch: Batch) -> Tensor:
    """Return the final-normed hidden states of a batch, flat (B*T, d); gradient flows if enabled."""
    decoder: Any = bare(model).get_decoder()
    if batch.segments is None:
        out = decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    else:
        # A 4-dimensional mask is passed on as it is, so transformers builds none; packed attention does not look at it.
        out = decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.input_ids.new_ones((1, 1, 1, 1)),
            position_ids=batch.position_ids,
            use_cache=False,
            keepset_segments=batch.segments,
        )
    return out.last_hidden_state.flatten(0, 1)


def token_nll(model: Any, batch: Batch, *, hidden: Tensor | None = None, chunk: int = head.CHUNK) -> Tensor:
    """Return the loss of every supervised token in nats, (S,) float32, in the order of `batch.labels`; differentiable.

    Args:
        model: a causal LM, or a PeftModel around one.
        batch: what `pack` made.
        hidden: `last_hidden(model, batch)` if it is at hand.
        chunk: float32 logits held at once.
    """
    hidden = last_hidden(model, batch) if hidden is None else hidden
    inner = bare(model)
    return head.nll(
        hidden[batch.predict], batch.labels, inner.get_output_embeddings(), head.logit_map(inner.config), chunk=chunk
    )


def row_sums(values: Tensor, row_of: Tensor, n: int) -> Tensor:
    """Sum (S,) token values per row: (n,), in float64 unless a gradient is wanted."""
    values = values if values.requires_grad else values.double()
    return values.new_zeros(n).index_add(0, row_of, values)


def probe(model: Any) -> bool:
    """Try an architecture that is not in `PACKABLE`: two short rows packed against the model's own logits one by one.

    Marks the model as served (`supports_packing`) when all log-probabilities agree to 1e-4, and returns whether it did.
    Sliding windows can't be seen by short rows, so a model that has one is not served.
    """
    inner = bare(model)
    text = inner.config.get_text_config()
    if getattr(inner.config, "_attn_implementation", None) != attention.NAME or getattr(text, "sliding_window", None):
        return False
    rng = np.random.default_rng(0)
    rows = [_Probe(rng.integers(0, text.vocab_size, n)) for n in (7, 5)]
    device = next(inner.parameters()).device
    try:
        with torch.no_grad():
            got = token_nll(model, pack(rows, [0, 1], packed=True, device=device))
            want = []
            for row in rows:
                ids = torch.from_numpy(row.input_ids)[None].to(device)
                z = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                want.append(-z.gather(1, ids[0, 1:, None])[:, 0])
        inner.keepset_probed = bool(torch.allclose(got, torch.cat(want), rtol=1e-4, atol=1e-4))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        log.debug("packing probe of %s failed: %s", text.model_type, error)
        inner.keepset_probed = False
    return bool(inner.keepset_probed)


@dataclass(frozen=True)
class _Probe:
    input_ids: np.ndarray

    @property
    def supervised(self) -> np.ndarray:
        return np.arange(len(self.input_ids)) > 0
