"""Per-example gradients inside one batched backward pass.

A linear layer's gradient for row i is a product over that row's positions alone. With x its input, G the gradient of
its output, W = W₀ + s·B·A:

    full weight   dWᵢ = Gᵢᵀ·xᵢ
    LoRA          dBᵢ = s·Gᵢᵀ·(xᵢ·Aᵀ),   dAᵢ = s·(Gᵢ·B)ᵀ·xᵢ
    below         dx  = G·W

so each recorded layer is replaced by one autograd.Function that hands (left, right) factors to a `Sink` and passes dx
on. Frozen weights get no gradient, and nothing runs below the lowest recorded layer's input. The output head runs at
supervised positions only, forward and gradient in one go, since the weight of each token's loss is known beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset import head
from keepset.features.matrices import Linear, find_linears
from keepset.packing import Batch, bare, last_hidden, supports_packing, token_nll

log = logging.getLogger(__name__)
LOGITS = 1 << 22
"""float32 logits formed at once by `head_gradient` (16 MiB: they stay in cache)."""


class Sink(Protocol):
    """Takes each recorded parameter's per-example factors as the backward pass reaches it."""

    def __call__(self, name: str, left: Tensor, right: Tensor, scale: float, batch: Batch) -> None:
        """Row i's gradient is scale · left[i's positions]ᵀ · right[i's positions]; both are (B*T, …) float32."""


@dataclass
class Recorder:
    """The layers being recorded, and where their gradients go; `run_backward` sets sink and batch.

    A recorded head sees predicting positions only, so it has a batch of its own.
    """

    linears: dict[str, Linear]
    sink: Sink | None = None
    batch: Batch | None = None
    head: Linear | None = None
    head_batch: Batch | None = None
    anchor: Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))

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
    sink, batch = recorder.sink, recorder.head_batch if linear is recorder.head else recorder.batch
    if sink is None or batch is None:
        raise RuntimeError("a backward pass ran without a sink and a batch set on the recorder")
    if linear.lora is not None:
        down, up, scale = linear.lora
        sink(linear.names[1], grad.float(), (x @ down.T.to(x.dtype)).float(), scale, batch)
        sink(linear.names[0], (grad @ up.to(grad.dtype)).float(), x.float(), scale, batch)
    elif linear.transposed:
        sink(linear.names[0], x.float(), grad.float(), 1.0, batch)
    else:
        sink(linear.names[0], grad.float(), x.float(), 1.0, batch)


@contextmanager
def recording(
    model: nn.Module, *, matrices: Sequence[str] | None = None, last_layers: int | None = None
) -> Iterator[Recorder]:
    """Replace the recorded layers' `forward` and freeze everything; both are undone afterwards.

    With the adapter off (`disable_adapter()`) a LoRA layer runs its own forward and nothing is recorded.

    Args:
        model: see `find_linears`.
        matrices: see `find_linears`.
        last_layers: see `find_linears`.
    """
    linears = find_linears(model, matrices=matrices, last_layers=last_layers)
    device = next(model.parameters()).device
    recorder = Recorder(linears, anchor=torch.zeros(0, device=device, requires_grad=True))
    output = bare(model).get_output_embeddings()
    recorder.head = next((linear for linear in linears.values() if linear.module is output), None)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    for linear in linears.values():
        linear.module.forward = _forward(linear, recorder)
    try:
        yield recorder
    finally:
        for linear in linears.values():
            del linear.module.forward
        for p in trainable:
            p.requires_grad_(True)


def _forward(linear: Linear, recorder: Recorder) -> Any:
    own = linear.module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if linear.lora is not None and linear.module.disable_adapters:
            return own(x, *args, **kwargs)
        return _Recorded.apply(x, recorder.anchor, linear, recorder)

    return forward


def products(left: Tensor, right: Tensor, batch: Batch, out: Tensor) -> Tensor:
    """Form leftᵢᵀ·rightᵢ for every row of a batch.

    Args:
        left: (B*T, a) float32.
        right: (B*T, b) float32.
        batch: whose rows' positions are meant.
        out: (n, a, b) float32, overwritten.
    """
    for i, (offset, length) in enumerate(zip(batch.offsets, batch.lengths, strict=True)):
        torch.mm(left[offset : offset + length].T, right[offset : offset + length], out=out[i])
    return out


def run_backward(model: nn.Module, recorder: Recorder, batch: Batch, weights: Tensor, sink: Sink) -> Tensor:
    """Run one batch forward and back for the loss Σ weights·nll.

    Args:
        model: inside `recording`.
        recorder: what `recording` gave.
        batch: packed or padded.
        weights: (S,) factor of each supervised token's loss.
        sink: receives every recorded parameter's factors.

    Returns:
        (S,) float32 token losses in nats, detached.
    """
    recorder.sink, recorder.batch = sink, batch
    try:
        with torch.enable_grad():
            hidden = last_hidden(model, batch)
            inner = bare(model)
            output = inner.get_output_embeddings()
            if recorder.head is not None:  # its inputs stand at predicting positions only
                counts = np.bincount(batch.row_of.cpu().numpy(), minlength=len(batch.lengths))
                starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
                recorder.head_batch = replace(batch, lengths=counts.tolist(), offsets=starts.tolist())
                logits = head.logit_map(inner.config)(output(hidden[batch.predict]))
                nll = F.cross_entropy(logits, batch.labels, reduction="none")
                (nll * weights).sum().backward()
                return nll.detach()
            if type(output) is not nn.Linear:
                nll = token_nll(model, batch, hidden=hidden)
                (nll * weights).sum().backward()
                return nll.detach()
            nll, grad = head_gradient(hidden.detach()[batch.predict], batch.labels, weights, output, inner.config)
            full = torch.zeros_like(hidden).index_add_(0, batch.predict, grad)
            hidden.backward(full)
            return nll
    finally:
        recorder.sink = recorder.batch = recorder.head_batch = None


@torch.no_grad()
def head_gradient(
    hidden: Tensor, labels: Tensor, weights: Tensor, output: nn.Linear, config: Any
) -> tuple[Tensor, Tensor]:
    """Token losses and the gradient of Σ weights·nll with respect to the hidden states, the logits formed once.

    Args:
        hidden: (S, d) final hidden states at predicting positions.
        labels: (S,) next tokens.
        weights: (S,) factor of each token's loss.
        output: the head.
        config: the model's; its soft cap and logit scale are honoured.

    Returns:
        nll (S,) float32 in nats and the gradient (S, d) in hidden's dtype.
    """
    mapping = head.logit_map(config)
    weight, bias = output.weight, output.bias
    step = max(16, LOGITS // weight.shape[0])
    nll, grad = torch.empty(len(labels), device=hidden.device), torch.empty_like(hidden)
    for start in range(0, len(labels), step):
        part = slice(start, min(start + step, len(labels)))
        z = mapping(F.linear(hidden[part], weight, bias))
        lse = z.logsumexp(1, keepdim=True)
        y = labels[part, None]
        nll[part] = (lse - z.gather(1, y))[:, 0]
        g = z.sub(lse).exp_() if mapping.cap is not None else z.sub_(lse).exp_()
        g.scatter_add_(1, y, torch.full_like(lse, -1.0))
        g.mul_(weights[part, None])
        grad[part] = mapping.backward(z, g).to(hidden.dtype) @ weight
    return nll, grad


def takes_packed(model: nn.Module) -> bool:
    """Whether batches may be packed; says so when they have to be padded."""
    packed = supports_packing(model)
    if not packed:
        kind = bare(model).config.get_text_config().model_type
        log.warning("gradients: '%s' with this attention runs padded, not packed: same numbers, slower", kind)
    return packed
