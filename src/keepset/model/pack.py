"""What runs together: batches under a token budget, packed rows, hidden states, token losses.

`plan_batches` is a pure function of the lengths, so batches (and with them every bit of the result) do not depend on
workers or resume points. A packed batch is one sequence of T = sum of lengths without padding; positions restart in
every row and attention stays inside it (`keepset.model.attention`). The output head runs at supervised positions only
(`keepset.model.head`).

A model whose attention can't be served that way takes the padded path: right padding, an attention mask made from the
lengths (never from a pad id: for many models pad = eos), the same numbers to rounding. Which path a model takes is no
list of names: `keepset.model.check` runs it both ways when it is loaded and compares with the model's own forward
pass (`Engine`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from keepset.errors import ModelError, first_line
from keepset.model import attention, head
from keepset.stopping import out_of_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """How a model's rows are run.

    Attributes:
        packed: rows stand in one sequence without padding, under keepset's attention; else padded, under the model's.
        head: `linear`: logits are `LogitMap(W h + b)`, formed in blocks of the vocabulary; `own`: by the model's own
            code after its decoder, run at the positions that are wanted.
        decoder: name of the module that makes the final hidden states.
        apart: a row of more tokens runs alone (0: every row does), since what stands beside it would change its
            numbers; None: nothing does.
    """

    packed: bool
    head: Literal["linear", "own"] = "linear"
    decoder: str = "model"
    apart: int | None = None


class Row(Protocol):
    """What packing needs of a row: `keepset.model.encode.Encoded` has it."""

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
        full: tokens of each row before trimming, the shared prefix counted.
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
    full: list[int]
    segments: attention.Segments | None = None

    @property
    def prefix(self) -> int:
        """Length of the beginning all rows share, computed once at flat positions 0 : prefix."""
        return self.segments.prefix if self.segments is not None else 0


def needed(row: Row, apart: int | None = None) -> int:
    """Tokens a row must be run for: those before its last supervised one, which is predicted and predicts nothing.

    A row of more than `apart` tokens is run whole: its length decides its positions' angles.
    """
    if apart is not None and len(row.input_ids) > apart:
        return len(row.input_ids)
    supervised = np.flatnonzero(row.supervised)
    return int(supervised[-1]) if len(supervised) else len(row.input_ids)


def plan_batches(lengths: Sequence[int] | np.ndarray, token_budget: int, apart: int | None = None) -> list[np.ndarray]:
    """Sort by length (ties by position) and fill batches greedily up to `token_budget` tokens.

    Every row stands in exactly one batch; a row longer than the budget gets its own. Longest first: memory trouble
    shows at once, and a progress bar's estimate errs on the safe side. A row of more than `apart` tokens gets a batch
    of its own too (`Engine.apart`). Returns arrays of positions in `lengths`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches: list[np.ndarray] = []
    start, total = 0, 0
    for i, size in enumerate(sizes[order]):
        alone = apart is not None and i > start and int(sizes[order[i - 1]]) > apart
        if i > start and (alone or total + size > token_budget):
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
    apart: int | None = None,
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
        apart: rows of more tokens are not trimmed.
    """
    if prefix and not packed:
        raise ValueError("a shared prefix needs a packed batch")
    index = np.asarray(indices, dtype=np.int64)
    chosen = [rows[int(i)] for i in index]
    full = [needed(row, apart) if trim else len(row.input_ids) for row in chosen]
    lengths = [n - prefix for n in full]
    own = [np.asarray(row.input_ids[prefix:n], dtype=np.int64) for row, n in zip(chosen, full, strict=True)]
    mask = None
    if packed:
        beginning = [np.asarray(chosen[0].input_ids[:prefix], dtype=np.int64)] if prefix else []
        ids = np.concatenate([*beginning, *own])[None]
        places = np.concatenate([np.arange(prefix), *(np.arange(prefix, n) for n in full)])[None]
        offsets = (prefix + np.concatenate([[0], np.cumsum(lengths[:-1])])).astype(np.int64).tolist()
    else:
        width = max(full)
        real = np.arange(width)[None, :] < np.asarray(full)[:, None]
        ids = np.full(real.shape, pad_token_id, dtype=np.int64)
        ids[real] = np.concatenate(own)
        places, mask = np.broadcast_to(np.arange(width), real.shape), real.astype(np.int64)
        offsets = (np.arange(len(full)) * width).tolist()
    predict, labels, row_of = _predictions(chosen, offsets, prefix)

    def tensor(x: np.ndarray) -> Tensor:
        return on_device(np.array(x, dtype=np.int64, order="C"), device)

    return Batch(
        rows=index,
        input_ids=tensor(ids),
        position_ids=tensor(places),
        attention_mask=None if mask is None else tensor(mask),
        lengths=lengths,
        offsets=offsets,
        predict=tensor(predict),
        labels=tensor(labels),
        row_of=tensor(row_of),
        full=[len(row.input_ids) for row in chosen],
        segments=attention.Segments.of(lengths, prefix) if packed else None,
    )


def on_device(x: np.ndarray, device: torch.device | str) -> Tensor:
    """Return an array as a tensor on a device; where that is a GPU, the host doesn't wait for it."""
    return torch.from_numpy(x).to(device, non_blocking=True)


def _predictions(rows: Sequence[Row], offsets: Sequence[int], prefix: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`predict`, `labels` and `row_of` of `Batch`, each (S,)."""
    predict, labels, row_of = [], [], []
    for r, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        t = np.flatnonzero(row.supervised)
        # The token at t is predicted from t - 1; just after a shared prefix that is the prefix's own last position.
        predict.append(np.where(t == prefix, prefix - 1, offset + t - prefix - 1) if prefix else offset + t - 1)
        labels.append(np.asarray(row.input_ids)[t])
        row_of.append(np.full(len(t), r))
    return np.concatenate(predict), np.concatenate(labels), np.concatenate(row_of)


def has_adapter(model: Any) -> bool:
    """Say whether a model is a PeftModel, whose adapter can be switched off."""
    return hasattr(model, "disable_adapter")


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


def engine(model: Any) -> Engine:
    """Return how the model's rows are run; a model that was never checked is checked now.

    Raises:
        ModelError: keepset can't give this architecture's own numbers (see `keepset.model.check`).
    """
    noted: Engine | None = getattr(bare(model), "keepset_engine", None)
    if noted is None:
        from keepset.model.check import check  # which runs this module's functions

        noted = check(model)
    return noted


def supports_packing(model: Any) -> bool:
    """Say whether `last_hidden` may be given packed batches."""
    return engine(model).packed


def sliding_window(config: Any) -> int | None:
    """Return how many last tokens a sliding layer of a text model sees; None: there is no window."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def full_span(model: Any) -> int | None:
    """Return the longest row of which every layer sees all, in positions that no other row changes; None: any row."""
    window = sliding_window(bare(model).config.get_text_config())
    limits = [int(n) for n in (window, engine(model).apart) if n is not None]
    return min(limits, default=None)


def decoder_of(model: Any) -> Any:
    """Return the module that makes the final hidden states."""
    return bare(model).get_submodule(engine(model).decoder)


def last_hidden(model: Any, batch: Batch) -> Tensor:
    """Return the final-normed hidden states of a batch, flat (B*T, d); gradient flows if enabled."""
    apart = engine(model).apart
    if apart is None or len(batch.lengths) == 1 or max(batch.full) <= apart:
        return _states(model, batch.input_ids, batch.position_ids, batch.attention_mask, batch.segments).flatten(0, 1)
    if batch.prefix:
        raise ValueError("rows that run alone share no beginning")
    parts = []
    for offset, length in zip(batch.offsets, batch.lengths, strict=True):
        ids = batch.input_ids.flatten()[offset : offset + length][None]
        segments = batch.segments and replace(batch.segments, groups=attention.Segments.of([length]).groups)
        states = _states(model, ids, torch.arange(length, device=ids.device)[None], None, segments)[0]
        width = length if batch.segments is not None else batch.input_ids.shape[1]
        parts.append(nn.functional.pad(states, (0, 0, 0, width - length)))
    return torch.cat(parts)


def _states(
    model: Any, ids: Tensor, positions: Tensor, mask: Tensor | None, segments: attention.Segments | None
) -> Tensor:
    if segments is None:  # a model counts positions its own way; padding stands on the right, where it moves none
        try:
            return decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        except (IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            kind, why = bare(model).config.model_type, first_line(error)
            raise ModelError(f"{kind}: its own code can't run rows of {ids.shape[1]} tokens: {why}") from error
    # A 4-dimensional mask is passed on as it is, so transformers builds none; packed attention does not look at it.
    out = decoder_of(model)(
        input_ids=ids,
        attention_mask=ids.new_ones((1, 1, 1, 1)),
        position_ids=positions,
        use_cache=False,
        keepset_segments=segments,
    )
    return out.last_hidden_state


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits (S, V) that the model's own code makes of final hidden states (S, d); differentiable."""
    return head.after_decoder(bare(model), decoder_of(model), hidden)


def token_nll(model: Any, batch: Batch, *, hidden: Tensor | None = None, chunk: int = head.CHUNK) -> Tensor:
    """Return the loss of every supervised token in nats, (S,) float32, in the order of `batch.labels`; differentiable.

    `hidden` is `last_hidden(model, batch)` if it is at hand.
    """
    hidden = last_hidden(model, batch) if hidden is None else hidden
    return nll_at(model, hidden[batch.predict], batch.labels, chunk=chunk)


def nll_at(model: Any, hidden: Tensor, labels: Tensor, *, chunk: int = head.CHUNK) -> Tensor:
    """Return the loss of each label (S,) in nats from the final hidden states (S, d) that predict it."""
    inner = bare(model)
    if engine(model).head == "own":
        return head.nll_in_parts(lambda h: own_logits(model, h), hidden, labels, chunk // vocabulary(inner))
    return head.nll(hidden, labels, inner.get_output_embeddings(), head.logit_map(inner.config), chunk=chunk)


def vocabulary(model: Any) -> int:
    """Return the number of rows of the input embedding."""
    return int(bare(model).get_input_embeddings().weight.shape[0])


def row_counts(row_of: Tensor, n: int) -> Tensor:
    """Return how many of the tokens (S,) are each row's, (n,) float32; unlike `bincount`, without waiting for a GPU."""
    return torch.zeros(n, device=row_of.device).index_add_(0, row_of, torch.ones(len(row_of), device=row_of.device))


def row_sums(values: Tensor, row_of: Tensor, n: int) -> Tensor:
    """Sum (S,) token values per row: (n,), in float64 unless a gradient is wanted."""
    values = values if values.requires_grad else values.double()
    return values.new_zeros(n).index_add(0, row_of, values)
