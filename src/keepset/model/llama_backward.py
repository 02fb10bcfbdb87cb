"""A forward and backward pass written out for Llama-like blocks: what autograd would do, with less work and traffic.

Served on the CPU in float32: Llama, Mistral, Qwen 2 and Qwen 3 decoders (SmolLM2 is a Llama). Per block, with W merged:

    x = norm(h);  q, k, v = rope(x·Wqᵀ), rope(x·Wkᵀ), x·Wvᵀ;  h += attention(q, k, v)·Woᵀ
    x = norm(h);  h += (silu(x·Wgᵀ) ⊙ x·Wuᵀ)·Wdᵀ

Less work than a plain pass, the numbers being the same:

* A beginning that all rows of the batch share (the template's system turn) goes forward once: no hidden state there
  depends on the row. Its gradient differs by row and is carried for each: it comes back through every row's attention
  to the prefix.
* A row ends at its last predicting position; the last block's MLP, the final norm and the head run at predicting
  positions.
* Nothing is saved below the lowest recorded layer, and the pass stops at that layer's input.

Three layouts of positions, n rows, prefix of P tokens, sum S of the rows' own tokens: activations stand compact
[P | S], gradients wide [n·P | S], and attention runs over rows, each its prefix and its own tokens. Without a prefix
all are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset.model.linears import Linear, plain_linear
from keepset.model.pack import Row, bare, decoder_of, engine

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
DECODERS = frozenset(["LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"])
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class Norm:
    """RMS norm: y = weight · x / √(mean x² + eps)."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and 1/rms (…, 1)."""
        rstd = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(self.eps).rsqrt_()[..., None]
        return (x * rstd).mul_(self.weight), rstd

    def backward_(self, into: Tensor, dy: Tensor, x: Tensor, rstd: Tensor, places: Places) -> None:
        """Add the gradient of x to `into`; dy (wide) is overwritten, x and rstd are compact."""
        dy.mul_(self.weight)
        for o, t, a, r in zip(places.wide(into), places.wide(dy), places.compact(x), places.compact(rstd), strict=True):
            dot = torch.linalg.vecdot(t, a.expand_as(t))[..., None] * (r**3 / x.shape[-1])
            o.addcmul_(t, r).addcmul_(a, dot, value=-1)


@dataclass(frozen=True)
class Block:
    """One decoder layer's parts, each linear layer with its merged weight and whether it is recorded."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    norm1: Norm
    norm2: Norm
    q_norm: Norm | None
    k_norm: Norm | None


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


@dataclass(frozen=True)
class Places:
    """Where the rows' positions stand; see the module for the three layouts.

    Attributes:
        lengths: own tokens of each row (without the prefix).
        offsets: where each row's own tokens start, counted from the end of the prefix part.
        prefix: P.
    """

    lengths: list[int]
    offsets: list[int]
    prefix: int = 0

    @property
    def n_wide(self) -> int:
        """Positions of the wide layout."""
        return len(self.lengths) * self.prefix + sum(self.lengths)

    def wide(self, x: Tensor) -> list[Tensor]:
        """Views of a wide tensor: prefix part (n, P, …) and own part (S, …); without a prefix just x."""
        if not self.prefix:
            return [x]
        n = len(self.lengths) * self.prefix
        return [x[:n].unflatten(0, (len(self.lengths), self.prefix)), x[n:]]

    def compact(self, x: Tensor) -> list[Tensor]:
        """Views of a compact tensor that broadcast against those of `wide`."""
        return [x[: self.prefix], x[self.prefix :]] if self.prefix else [x]


@dataclass(frozen=True)
class Rows:
    """One batch as the pass takes it: index tensors between the layouts (None where they are the same)."""

    ids: Tensor
    positions: Tensor
    places: Places
    predict: Tensor  # compact positions
    predict_wide: Tensor
    labels: Tensor
    row_of: Tensor
    at_predict: Places
    rows_of_compact: Tensor | None
    compact_of_rows: Tensor | None
    rows_of_wide: Tensor | None
    wide_of_rows: Tensor | None
    groups: list[tuple[int, int, int]]


def common_prefix(rows: Sequence[Row]) -> int:
    """Tokens all rows begin with, before anything that predicts a supervised token; 0 if sharing gains nothing."""
    if len(rows) < 2:
        return 0
    limit = min(int(np.argmax(r.supervised)) if r.supervised.any() else len(r.input_ids) for r in rows) - 1
    limit = min(limit, min(len(r.input_ids) for r in rows) - 1)
    if limit < SHORTEST_PREFIX:
        return 0
    heads = np.stack([np.asarray(r.input_ids[:limit]) for r in rows])
    same = (heads == heads[0]).all(0)
    length = limit if same.all() else int(np.argmin(same))
    return length if length >= SHORTEST_PREFIX else 0


def lay_out(rows: Sequence[Row]) -> Rows:
    """Cut each row at its last predicting position and place the rows."""
    prefix = common_prefix(rows)
    ends = [int(np.flatnonzero(r.supervised)[-1]) if r.supervised.any() else len(r.input_ids) for r in rows]
    own = np.array(ends) - prefix
    starts = np.concatenate([[0], np.cumsum(own)[:-1]])
    n, total = len(rows), int(own.sum())
    ids = [
        np.asarray(rows[0].input_ids[:prefix]),
        *(np.asarray(r.input_ids[prefix:e]) for r, e in zip(rows, ends, strict=True)),
    ]
    positions = [np.arange(prefix), *(np.arange(prefix, e) for e in ends)]
    predict, labels, row_of = [], [], []
    for i, row in enumerate(rows):
        t = np.flatnonzero(row.supervised)
        predict.append(starts[i] + t - 1 - prefix)
        labels.append(np.asarray(row.input_ids)[t])
        row_of.append(np.full(len(t), i))
    counts = [len(t) for t in labels]
    indices: list[Tensor | None] = [None] * 4
    if prefix:
        compact = np.concatenate(
            [np.r_[0:prefix, prefix + s : prefix + s + w] for s, w in zip(starts, own, strict=True)]
        )
        wide = np.concatenate(
            [
                np.r_[i * prefix : (i + 1) * prefix, n * prefix + s : n * prefix + s + w]
                for i, (s, w) in enumerate(zip(starts, own, strict=True))
            ]
        )
        compact_of = np.empty(prefix + total, np.int64)
        compact_of[compact] = np.arange(len(compact))
        wide_of = np.empty(len(wide), np.int64)
        wide_of[wide] = np.arange(len(wide))
        indices = [torch.from_numpy(x.astype(np.int64)) for x in (compact, compact_of, wide, wide_of)]
    groups: list[tuple[int, int, int]] = []
    at = 0
    for length in ends:
        if groups and groups[-1][2] == length:
            groups[-1] = (groups[-1][0], groups[-1][1] + 1, length)
        else:
            groups.append((at, 1, length))
        at += length
    where = np.concatenate(predict)
    return Rows(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        places=Places(own.tolist(), starts.tolist(), prefix),
        predict=torch.from_numpy(where + prefix),
        predict_wide=torch.from_numpy(where + n * prefix),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        row_of=torch.from_numpy(np.concatenate(row_of)),
        at_predict=Places(counts, np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int).tolist()),
        rows_of_compact=indices[0],
        compact_of_rows=indices[1],
        rows_of_wide=indices[2],
        wide_of_rows=indices[3],
        groups=groups,
    )


def read_norm(module: Any) -> Norm | None:
    """The norm's numbers, or None where a model has none."""
    return None if module is None else Norm(module.weight.detach(), module.variance_epsilon)


def read_blocks(decoder: Any, by_module: dict[int, Linear]) -> list[Block]:
    """The decoder's layers; a linear layer found in `by_module` (by its id) has the weight given there."""
    blocks = []
    for layer in decoder.layers:
        a, m = layer.self_attn, layer.mlp
        modules = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        parts = [by_module.get(id(x)) or plain_linear(x) for x in modules]
        norms = [read_norm(layer.input_layernorm), read_norm(layer.post_attention_layernorm)]
        extra = [read_norm(getattr(a, "q_norm", None)), read_norm(getattr(a, "k_norm", None))]
        blocks.append(Block(*parts, *norms, *extra))  # type: ignore[arg-type]
    return blocks


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


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate (T, H, D) in place by (T, 1, D/2) angles, or rotate a gradient back."""
    first, second = x.chunk(2, -1)
    sign = -1.0 if back else 1.0
    rotated = (first * cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(first, sin, value=sign)
    first.copy_(rotated)
    return x


def _grouped(x: Tensor, group: tuple[int, int, int]) -> Tensor:
    """(T, H, D) -> (rows, H, length, D), a view."""
    start, rows, length = group
    return x.narrow(0, start, rows * length).unflatten(0, (rows, length)).transpose(1, 2)


def attend(qkv: list[Tensor], groups: list[tuple[int, int, int]], scale: float) -> tuple[Tensor, list[Tensor]]:
    """Causal attention inside each row: (T, H, D) and each group's log-sum-exps."""
    out, lses = torch.empty_like(qkv[0]), []
    for group in groups:
        q, k, v = (_grouped(x, group) for x in qkv)
        part, lse = _flash(q, k, v, 0.0, True, scale=scale)
        _grouped(out, group).copy_(part)
        lses.append(lse)
    return out, lses


def attend_backward(
    grad: Tensor,
    qkv: list[Tensor],
    out: Tensor,
    lses: list[Tensor],
    groups: list[tuple[int, int, int]],
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v in their own layout."""
    wholes = [torch.empty_like(x) for x in qkv]
    for group, lse in zip(groups, lses, strict=True):
        parts = _flash_backward(*(_grouped(x, group) for x in (grad, *qkv, out)), lse, 0.0, True, scale=scale)
        for whole, part in zip(wholes, parts, strict=True):
            _grouped(whole, group).copy_(part)
    return wholes


def serves(model: nn.Module, linears: dict[str, Linear]) -> bool:
    """Whether the written-out pass can stand in for autograd on this model."""
    if engine(model).head != "linear":
        return False
    inner = bare(model)
    decoder = decoder_of(model)
    config = inner.config.get_text_config()
    if type(decoder).__name__ not in DECODERS or config.hidden_act not in ("silu", "swish"):
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    if type(inner.get_output_embeddings()) is not nn.Linear or getattr(decoder, "gradient_checkpointing", False):
        return False
    covered = {id(linear.module) for linear in linears.values()}
    layers = [m for n, m in decoder.named_modules() if n.endswith("_proj")]
    return all(id(m) in covered or type(m) is nn.Linear for m in layers)
