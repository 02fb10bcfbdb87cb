"""A forward pass written out for Llama-like blocks, without gradient: hidden states where something is predicted.

It serves what `llama_backward` serves, with the same blocks, and gives the model's own numbers with less work:

* A beginning that rows share runs once a call, not once a batch: its keys and values are kept.
* The last block's output projection and MLP, and the final norm, run at predicting positions only.
* Rotation, activation and the residual sums are done in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset.model.attention import beside_prefix, packed_attention
from keepset.model.linears import Linear
from keepset.model.llama_blocks import Block, read_blocks, read_norm, rope_
from keepset.model.pack import Batch, decoder_of

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Beginning:
    """A shared prefix of P tokens: each layer's keys and values (1, Hk, P, D), and the final hidden states (P, d)."""

    ids: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    hidden: Tensor


class LlamaForward:
    """The pass over one model with given weights; `llama_blocks.serves` says for which models."""

    def __init__(self, model: nn.Module, linears: dict[str, Linear]) -> None:
        """Read the blocks; `linears` holds the layers whose weights are not the module's own."""
        decoder = decoder_of(model)
        self.decoder = decoder
        self.blocks = read_blocks(decoder, {id(linear.module): linear for linear in linears.values()})
        self.head_dim = int(decoder.layers[0].self_attn.head_dim)
        self.scale = float(decoder.layers[0].self_attn.scaling)
        self.final = read_norm(decoder.norm)
        self.beginning: Beginning | None = None  # the last one: batches of one beginning follow each other

    def __call__(self, batch: Batch) -> Tensor:
        """Final-normed hidden states (S, d) at `batch.predict` of a packed batch."""
        segments, p = batch.segments, batch.prefix
        assert segments is not None
        ids, positions = batch.input_ids[0], batch.position_ids
        if not p:

            def within(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return packed_attention(q, k, v, segments, scale=self.scale)[0]

            return self._run(ids, positions, within, batch.predict)
        beginning = self._begin(ids[:p], positions[:, :p])

        def beside(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return beside_prefix(q, k, v, beginning.keys_values[layer], segments, scale=self.scale)

        own = batch.predict >= p  # what follows the beginning directly is predicted from its last position
        hidden = beginning.hidden.new_empty(len(batch.predict), beginning.hidden.shape[1])
        hidden[own] = self._run(ids[p:], positions[:, p:], beside, batch.predict[own] - p)
        hidden[~own] = beginning.hidden[batch.predict[~own]]
        return hidden

    def _begin(self, ids: Tensor, positions: Tensor) -> Beginning:
        if self.beginning is None or not torch.equal(self.beginning.ids, ids):
            kept: list[tuple[Tensor, Tensor]] = []

            def alone(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                kept.append((k, v))
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
                )[0].transpose(0, 1)

            self.beginning = Beginning(ids, kept, self._run(ids, positions, alone, None))
        return self.beginning

    def _run(self, ids: Tensor, positions: Tensor, attend: Attend, at: Tensor | None) -> Tensor:
        """Run tokens (T,) through the blocks; the last block gives the positions `at` only (None: all)."""
        h = F.embedding(ids, self.decoder.embed_tokens.weight)
        cos, sin = (x[0, :, None, : self.head_dim // 2] for x in self.decoder.rotary_emb(h[None], positions))
        for layer, b in enumerate(self.blocks):
            q, k, v = (x.transpose(0, 1)[None] for x in self._qkv(b, h, cos, sin))
            o = attend(layer, q, k, v).flatten(1)
            if at is not None and layer == len(self.blocks) - 1:
                o, h = o[at], h[at]
            _add_linear_(h, o, b.o)
            x, _ = b.norm2.forward(h)
            act = F.silu(F.linear(x, b.gate.weight, b.gate.bias), inplace=True)
            _add_linear_(h, act.mul_(F.linear(x, b.up.weight, b.up.bias)), b.down)
        assert self.final is not None
        return self.final.forward(h)[0]

    def _qkv(self, b: Block, h: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Queries, keys and values (T, heads, D) of a block, rotated."""
        x, _ = b.norm1.forward(h)
        out = []
        for linear, norm in ((b.q, b.q_norm), (b.k, b.k_norm), (b.v, None)):
            y = F.linear(x, linear.weight, linear.bias).unflatten(1, (-1, self.head_dim))
            y = y if norm is None else norm.forward(y)[0]
            out.append(y if linear is b.v else rope_(y, cos, sin))
        return out


def _add_linear_(h: Tensor, x: Tensor, linear: Linear) -> None:
    """h += x·Wᵀ + bias, in place."""
    h.addmm_(x, linear.weight.T)
    if linear.bias is not None:
        h.add_(linear.bias)
