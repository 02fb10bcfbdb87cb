"""A forward and backward pass written out for Llama-like blocks: what autograd would do, with less work and traffic.

Less work than a plain pass, the numbers being the same:

* A beginning that all rows of the batch share (the template's system turn) goes forward once: no hidden state there
  depends on the row. Its gradient differs by row and is carried for each: it comes back through every row's attention
  to the prefix. `layout` says which positions stand where.
* A row ends at its last predicting position; the last block's MLP, the final norm and the head run at predicting
  positions.
* Nothing is saved below the lowest recorded layer, and the pass stops at that layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset.model.attention import Run, flash, flash_backward
from keepset.model.layout import Places, Rows
from keepset.model.linears import Linear
from keepset.model.llama_blocks import Block, read_blocks, read_norm, rope_
from keepset.model.pack import decoder_of


@dataclass(frozen=True)
class Saved:
    """What a block's backward needs of its forward; x2 only where gate or up is recorded, raw q and k where normed."""

    h: Tensor
    x1: Tensor
    rstd1: Tensor
    raw: list[tuple[Tensor, Tensor] | None]
    qkv: list[Tensor]
    out: Tensor
    lses: list[Tensor]
    o: Tensor
    h2: Tensor
    x2: Tensor | None
    rstd2: Tensor
    gate: Tensor
    up: Tensor


class LlamaPass:
    """The pass over one model with its recorded layers."""

    def __init__(self, model: nn.Module, linears: dict[str, Linear]) -> None:
        decoder = decoder_of(model)
        by_module = {id(linear.module): linear for linear in linears.values()}
        self.recorded = {id(linear) for linear in linears.values() if linear.recorded}
        self.decoder = decoder
        self.blocks = read_blocks(decoder, by_module)
        self.head_dim = int(decoder.layers[0].self_attn.head_dim)
        self.scale = float(decoder.layers[0].self_attn.scaling)
        self.final = read_norm(decoder.norm)
        used = [i for i, b in enumerate(self.blocks) if any(id(x) in self.recorded for x in vars(b).values())]
        self.lowest = min(used, default=len(self.blocks))

    @torch.no_grad()
    def forward(self, rows: Rows) -> tuple[Tensor, list[Any]]:
        """Final-normed hidden states at predicting positions (S, d), and what `backward` needs."""
        h = F.embedding(rows.ids, self.decoder.embed_tokens.weight)
        cos, sin = (x[0, :, None, : self.head_dim // 2] for x in self.decoder.rotary_emb(h[None], rows.positions[None]))
        tape: list[Any] = []
        for i, b in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x1, rstd1 = b.norm1.forward(h)
            raw: list[tuple[Tensor, Tensor] | None] = []
            qkv: list[Tensor] = []
            for linear, norm in ((b.q, b.q_norm), (b.k, b.k_norm), (b.v, None)):
                y = F.linear(x1, linear.weight, linear.bias).unflatten(1, (-1, self.head_dim))
                raw.append(None)
                if norm is not None:
                    before = y
                    y, rstd = norm.forward(before)
                    raw[-1] = before, rstd
                if linear is not b.v:
                    rope_(y, cos, sin)
                qkv.append(y if rows.rows_of_compact is None else y.index_select(0, rows.rows_of_compact))
            out, lses = attend(qkv, rows.groups, self.scale)
            o = out if rows.compact_of_rows is None else out.index_select(0, rows.compact_of_rows)
            o = o.flatten(1)
            h2 = F.linear(o, b.o.weight, b.o.bias).add_(h)
            if last:
                h2 = h2.index_select(0, rows.predict)
            x2, rstd2 = b.norm2.forward(h2)
            gate, up = F.linear(x2, b.gate.weight, b.gate.bias), F.linear(x2, b.up.weight, b.up.bias)
            act = F.silu(gate).mul_(up)
            if i >= self.lowest:
                gated = id(b.gate) in self.recorded or id(b.up) in self.recorded
                tape.append(Saved(h, x1, rstd1, raw, qkv, out, lses, o, h2, x2 if gated else None, rstd2, gate, up))
            h = F.linear(act, b.down.weight, b.down.bias).add_(h2)
        assert self.final is not None
        hidden, rstd = self.final.forward(h)
        return hidden, [*tape, (h, rstd, cos, sin)]

    @torch.no_grad()
    def backward(self, rows: Rows, tape: list[Any], grad: Tensor, hand_over: Any) -> None:
        """Run back from the gradient (S, d) at predicting positions; `hand_over` takes recorded layers."""
        h, rstd, cos, sin = tape.pop()  # what stands below the head
        if rows.rows_of_compact is not None:
            cos, sin = cos.index_select(0, rows.rows_of_compact), sin.index_select(0, rows.rows_of_compact)
        assert self.final is not None
        dh = torch.zeros_like(grad)
        self.final.backward_(dh, grad, h, rstd, rows.at_predict)
        for i in range(len(self.blocks) - 1, self.lowest - 1, -1):
            b, last = self.blocks[i], i == len(self.blocks) - 1
            t = tape.pop()
            places = rows.at_predict if last else rows.places
            dx = self._mlp(b, dh, t.gate, t.up, t.x2, places, hand_over)
            b.norm2.backward_(dh, dx, t.h2, t.rstd2, places)
            if last:
                dh = dh.new_zeros(rows.places.n_wide, dh.shape[1]).index_copy_(0, rows.predict_wide, dh)
            places = rows.places
            self._hand(b.o, t.o, dh, places, hand_over)
            do = dh @ b.o.weight
            if rows.rows_of_wide is not None:
                do = do.index_select(0, rows.rows_of_wide)
            grads = attend_backward(do.view_as(t.out), t.qkv, t.out, t.lses, rows.groups, self.scale)
            below: Tensor | None = None
            for k, (linear, norm) in enumerate(((b.q, b.q_norm), (b.k, b.k_norm), (b.v, None))):
                g = grads[k]
                if linear is not b.v:
                    rope_(g, cos, sin, back=True)
                if rows.wide_of_rows is not None:
                    g = g.index_select(0, rows.wide_of_rows)
                if norm is not None:
                    saved = t.raw[k]
                    assert saved is not None
                    into = torch.zeros_like(g)
                    norm.backward_(into, g, saved[0], saved[1], places)
                    g = into
                g = g.flatten(1)
                self._hand(linear, t.x1, g, places, hand_over)
                if i > self.lowest:
                    below = g @ linear.weight if below is None else below.addmm_(g, linear.weight)
            if below is not None:
                b.norm1.backward_(dh, below, t.h, t.rstd1, places)

    def _hand(self, linear: Linear, x: Tensor, grad: Tensor, places: Places, hand_over: Any) -> None:
        if id(linear) in self.recorded:
            hand_over(linear, x, grad, places)

    def _mlp(
        self, b: Block, dh: Tensor, gate: Tensor, up: Tensor, x2: Tensor | None, places: Places, hand_over: Any
    ) -> Tensor:
        """Gradient of the MLP's input, wide; gate and up are overwritten."""
        sigmoid = gate.sigmoid()
        silu = gate.mul_(sigmoid)
        if id(b.down) in self.recorded:
            hand_over(b.down, silu * up, dh, places)
        slope = sigmoid.addcmul_(silu, 1 - sigmoid).mul_(up)  # d act / d gate = up · (σ + g·σ·(1 − σ))
        dgate = dh @ b.down.weight
        dup = torch.empty_like(dgate)
        for o, d, s, g in zip(
            places.wide(dup), places.wide(dgate), places.compact(silu), places.compact(slope), strict=True
        ):
            torch.mul(d, s, out=o)
            d.mul_(g)
        if x2 is not None:
            self._hand(b.gate, x2, dgate, places, hand_over)
            self._hand(b.up, x2, dup, places, hand_over)
        return (dgate @ b.gate.weight).addmm_(dup, b.up.weight)


def _grouped(x: Tensor, group: Run) -> Tensor:
    """(T, H, D) -> (rows, H, length, D), a view."""
    start, rows, length = group
    return x.narrow(0, start, rows * length).unflatten(0, (rows, length)).transpose(1, 2)


def attend(qkv: list[Tensor], groups: list[Run], scale: float) -> tuple[Tensor, list[Tensor]]:
    """Causal attention inside each row: (T, H, D) and each group's log-sum-exps."""
    out, lses = torch.empty_like(qkv[0]), []
    for group in groups:
        q, k, v = (_grouped(x, group) for x in qkv)
        part, lse = flash(q, k, v, 0.0, True, scale=scale)
        _grouped(out, group).copy_(part)
        lses.append(lse)
    return out, lses


def attend_backward(
    grad: Tensor,
    qkv: list[Tensor],
    out: Tensor,
    lses: list[Tensor],
    groups: list[Run],
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v in their own layout."""
    wholes = [torch.empty_like(x) for x in qkv]
    for group, lse in zip(groups, lses, strict=True):
        parts = flash_backward(*(_grouped(x, group) for x in (grad, *qkv, out)), lse, 0.0, True, scale=scale)
        for whole, part in zip(wholes, parts, strict=True):
            _grouped(whole, group).copy_(part)
    return wholes
