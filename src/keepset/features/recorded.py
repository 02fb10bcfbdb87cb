"""A linear layer whose backward pass hands over per-example factors, and the product of the factors.

A linear layer's gradient for row i is a product over that row's positions alone. With x its input, G the gradient of
its output, W = W₀ + s·B·A:

    full weight   dWᵢ = Gᵢᵀ·xᵢ
    LoRA          dBᵢ = s·Gᵢᵀ·(xᵢ·Aᵀ),   dAᵢ = s·(Gᵢ·B)ᵀ·xᵢ
    below         dx  = G·W

so each recorded layer is replaced by one autograd.Function that hands (left, right) factors to a `Sink` and passes dx
on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from keepset.model.layout import Places
from keepset.model.linears import Linear
from keepset.model.llama_backward import LlamaPass


class Sink(Protocol):
    """Takes each recorded parameter's per-example factors as the backward pass reaches it."""

    def __call__(self, name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        """Row i's gradient is scale · left[i's positions]ᵀ · right[i's positions], see `products`; both float32."""


@dataclass
class Recorder:
    """The layers being recorded, and where their gradients go; `gradients.run_rows` sets sink and places.

    A recorded head sees predicting positions only, so it has places of its own. `written` is the pass without autograd,
    for the models it serves.
    """

    linears: dict[str, Linear]
    anchor: Tensor
    sink: Sink | None = None
    places: Places | None = None
    head: Linear | None = None
    head_places: Places | None = None
    written: LlamaPass | None = None
    packed: bool = True
    span: int | None = None
    apart: int | None = None
    linear_head: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Parameter name to shape, in the model's order."""
        return {n: s for linear in self.linears.values() for n, s in zip(linear.names, linear.shapes, strict=True)}


class _Recorded(torch.autograd.Function):
    """A linear layer whose backward hands over per-example factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, linear: Linear, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.recorder = linear, recorder
        return F.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        hand_over(ctx.linear, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), ctx.recorder)
        return (grad @ ctx.linear.weight if ctx.needs_input_grad[0] else None), None, None, None


def hand_over(linear: Linear, x: Tensor, grad: Tensor, recorder: Recorder) -> None:
    """Give the sink one layer's factors, from its input x (B*T, in) and its output's gradient (B*T, out)."""
    places = recorder.head_places if linear is recorder.head else recorder.places
    if recorder.sink is None or places is None:
        raise RuntimeError("a backward pass ran outside run_rows")
    hand_factors(recorder.sink, linear, x, grad, places)


def hand_factors(sink: Sink, linear: Linear, x: Tensor, grad: Tensor, places: Places) -> None:
    """Give a sink one layer's factors; x is compact, grad wide where rows share a prefix (see `layout`)."""
    if linear.lora is not None:
        down, up, scale = linear.lora
        sink(linear.names[1], grad.float(), (x @ down.T.to(x.dtype)).float(), scale, places)
        sink(linear.names[0], (grad @ up.to(grad.dtype)).float(), x.float(), scale, places)
    elif linear.transposed:
        sink(linear.names[0], x.float(), grad.float(), 1.0, places)
    else:
        sink(linear.names[0], grad.float(), x.float(), 1.0, places)


def recorded_forward(linear: Linear, recorder: Recorder) -> Any:
    """The `forward` that stands in for a layer's own while it is recorded."""
    own = linear.module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if linear.lora is not None and linear.module.disable_adapters:
            return own(x, *args, **kwargs)
        return _Recorded.apply(x, recorder.anchor, linear, recorder)

    return forward


def products(left: Tensor, right: Tensor, places: Places, out: Tensor) -> Tensor:
    """Form leftᵢᵀ·rightᵢ for every row of a batch.

    `left` (positions, a) is wide where rows share a prefix of P tokens: n·P, then the rows' own; `right` (positions, b)
    is compact: P, then the rows' own; `out` (n, a, b) is overwritten.
    """
    n, p = len(places.lengths), places.prefix
    if p:
        torch.bmm(left[: n * p].unflatten(0, (n, p)).transpose(1, 2), right[:p].expand(n, p, right.shape[1]), out=out)
    for i, (offset, length) in enumerate(zip(places.offsets, places.lengths, strict=True)):
        a, b = left.narrow(0, n * p + offset, length), right.narrow(0, p + offset, length)
        if p:
            out[i].addmm_(a.T, b)
        else:
            torch.mm(a.T, b, out=out[i])
    return out
