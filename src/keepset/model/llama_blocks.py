"""Llama-like blocks as the written-out passes read them: norms, linear layers with merged weights, rotation.

    x = norm(h);  q, k, v = rope(x·Wqᵀ), rope(x·Wkᵀ), x·Wvᵀ;  h += attention(q, k, v)·Woᵀ
    x = norm(h);  h += (silu(x·Wgᵀ) ⊙ x·Wuᵀ)·Wdᵀ

Served on the CPU in float32: Llama, Mistral, Qwen 2 and Qwen 3 decoders (SmolLM2 is a Llama).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keepset.model.layout import Places
from keepset.model.linears import Linear, plain_linear
from keepset.model.pack import bare, decoder_of, engine

DECODERS = frozenset(["LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"])


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


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate (T, H, D) in place by (T, 1, D/2) angles, or rotate a gradient back."""
    first, second = x.chunk(2, -1)
    sign = -1.0 if back else 1.0
    rotated = (first * cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(first, sin, value=sign)
    first.copy_(rotated)
    return x


def serves(model: nn.Module, linears: dict[str, Linear]) -> bool:
    """Whether the written-out passes can stand in for the model's own code."""
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
