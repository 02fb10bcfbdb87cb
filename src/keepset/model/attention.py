"""Attention over packed rows: causal scaled-dot-product attention inside each segment, never across two.

Registered with transformers under the name `keepset`, so that a model loaded with `attn_implementation="keepset"`
serves both uses: a call that brings `keepset_segments` attends per segment; any other call (padded training,
generation) is handed to transformers' own `sdpa` function and mask, unchanged.

A packed batch passes a 4-dimensional dummy as `attention_mask`: transformers returns such a mask as it is, so no (T, T)
mask is built and no value is read back from the device. Layers that pass `sliding_window` see only that many last
tokens.

On the CPU one autograd.Function calls the flash kernel and its backward on strided views of the packed q, k, v: rows of
equal length lie side by side (packing sorts by length) and share one call, key/value heads are not repeated, and the
gradient is written once, where autograd's per-segment slices would fill and add a full-size tensor for every segment.
Elsewhere (untested on GPU) the same views go through `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "keepset"
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Run = tuple[int, int, int]
"""(start, rows, length) of adjacent rows of equal length, which share one call of the kernel."""


def runs_of(lengths: Sequence[int], start: int = 0) -> list[Run]:
    """Group adjacent rows of equal length; the first one starts at position `start`."""
    runs: list[Run] = []
    for length in lengths:
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs


@dataclass(frozen=True)
class Segments:
    """How the T positions of a packed batch are divided.

    Attributes:
        groups: (start, rows, length) of each run of equally long rows; together they cover [prefix, T).
        prefix: the first `prefix` positions are a common beginning that every row attends to (0: none).
        twice: use torch's own attention, which can be differentiated twice (under `SDPBackend.MATH`).
    """

    groups: tuple[Run, ...]
    prefix: int = 0
    twice: bool = False
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(lengths: list[int], prefix: int = 0) -> Segments:
        """Group adjacent equal lengths; `lengths` do not count the prefix."""
        return Segments(tuple(runs_of(lengths, prefix)), prefix)

    def window_mask(self, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return the additive (length, length) mask of a window shorter than the row, else None (plain causal)."""
        if window is None or window >= length:
            return None
        key = (length, window, like.dtype, like.device)
        if key not in self.masks:
            query = torch.arange(length, device=like.device)[:, None]
            keys = torch.arange(length, device=like.device)[None, :]
            seen = (keys <= query) & (keys > query - window)
            mask = torch.zeros(length, length, dtype=like.dtype, device=like.device)
            self.masks[key] = mask.masked_fill_(~seen, float("-inf"))
        return self.masks[key]


def _rows(x: Tensor, group: Run) -> Tensor:
    """View the positions of a group of x (1, H, T, D) as (rows, H, length, D), without a copy."""
    start, rows, length = group
    return x[0].narrow(1, start, rows * length).unflatten(1, (rows, length)).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """Turn (rows, H, length, D) into (rows * length, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


class _PackedCpu(torch.autograd.Function):
    """Causal attention per segment on the CPU's flash kernel; (1, H, T, D) x (1, Hk, T, D) x 2 -> (1, T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
    ) -> Tensor:
        outs, saved = [], []
        for group in segments.groups:
            mask = segments.window_mask(group[2], window, q)
            out, lse = flash(
                _rows(q, group), _rows(k, group), _rows(v, group), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            outs.append(_flat(out))
            saved.append(lse)
        result = (torch.cat(outs) if len(outs) > 1 else outs[0])[None]
        ctx.save_for_backward(q, k, v, result, *saved)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, *saved = ctx.saved_tensors
        # Laid out as (1, T, H, D), like q, k and v themselves, so that what follows needs no copy.
        dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
        grad, result = grad.transpose(1, 2), result.transpose(1, 2)
        for group, lse in zip(ctx.segments.groups, saved, strict=True):
            mask = ctx.segments.window_mask(group[2], ctx.window, q)
            parts = flash_backward(
                *(_rows(x, group) for x in (grad, q, k, v, result)),
                lse,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                _rows(whole, group).copy_(part)
        return dq, dk, dv, None, None, None


def _packed_with_prefix(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Attention when all rows share a prefix whose keys and values stand once at the front (CPU, no gradient)."""
    p = segments.prefix
    head, _ = flash(q[:, :, :p], k[:, :, :p], v[:, :, :p], 0.0, True, scale=scale)
    own, beginning = [x[:, :, p:] for x in (q, k, v)], (k[:, :, :p], v[:, :, :p])
    return torch.cat([_flat(head), beside_prefix(own[0], own[1], own[2], beginning, segments, scale=scale)])[None]


def beside_prefix(
    q: Tensor, k: Tensor, v: Tensor, beginning: tuple[Tensor, Tensor], segments: Segments, *, scale: float | None = None
) -> Tensor:
    """Attention of the rows' own tokens to a shared prefix and, causally, to their row (CPU, no gradient).

    softmax over [prefix, own] = the two softmaxes mixed by their log-sum-exps: w = sigmoid(lse_prefix - lse_own).
    Queries (1, H, T, D) and keys, values (1, Hk, T, D) are of the rows' own T tokens, `beginning` holds keys and values
    (1, Hk, P, D) of the prefix, `segments` divides P + T. `scale` None is 1/sqrt(D). Returns (T, H, D).
    """
    out, lse = flash(q, *beginning, 0.0, False, scale=scale)
    from_prefix = out[0].transpose(0, 1)
    outs, lses = [], []
    for start, rows, length in segments.groups:
        group = (start - segments.prefix, rows, length)
        out, own = flash(_rows(q, group), _rows(k, group), _rows(v, group), 0.0, True, scale=scale)
        outs.append(_flat(out))
        lses.append(own.transpose(1, 2).flatten(0, 1))
    weight = torch.sigmoid(lse[0].transpose(0, 1) - torch.cat(lses))[..., None].to(q.dtype)
    return torch.cat(outs).lerp_(from_prefix, weight)


def _packed_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    outs = []
    for group in segments.groups:
        mask = segments.window_mask(group[2], window, q)
        out = F.scaled_dot_product_attention(
            _rows(q, group),
            _rows(k, group),
            _rows(v, group),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(_flat(out))
    return torch.cat(outs)[None]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention inside each segment.

    Queries are (1, H, T, D), keys and values (1, Hk, T, D), H a multiple of Hk. `scale` None is 1/sqrt(D). A query sees
    its own and the `window` - 1 tokens before it; None: the whole row. Returns (1, T, H, D), the layout transformers'
    attention functions return.
    """
    if segments.prefix:
        longest = segments.prefix + max(length for _, _, length in segments.groups)
        if torch.is_grad_enabled() or q.device.type != "cpu" or (window is not None and window < longest):
            raise ValueError("a shared prefix is for CPU forward passes of rows no longer than the sliding window")
        return _packed_with_prefix(q, k, v, segments, scale)
    if q.device.type == "cpu" and not segments.twice:
        return _PackedCpu.apply(q, k, v, segments, scale, window)
    return _packed_elsewhere(q, k, v, segments, scale, window)


def keepset_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    keepset_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve transformers' attention interface: packed when the call brings segments, else transformers' `sdpa`."""
    if keepset_segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in HARMLESS)
    if unknown:  # attention sinks, soft caps, biases: what is not understood is never left out
        raise ValueError(f"packed attention does not know what to do with {', '.join(unknown)}")
    if dropout:
        raise ValueError("packed attention has no dropout: put the model in eval mode or set attention_dropout to 0")
    return packed_attention(query, key, value, keepset_segments, scale=scaling, window=sliding_window), None


HARMLESS = frozenset(["position_ids", "use_cache", "cache_position", "layer_idx", "output_attentions", "is_causal"])
"""What layers hand to an attention function beside what `keepset_attention` takes, without effect on its numbers."""


AttentionInterface.register(NAME, keepset_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
