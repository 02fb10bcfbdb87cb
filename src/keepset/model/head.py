"""The output head at chosen positions: log-probabilities without the full logits.

For hidden state h and next token y: nll = logsumexp_v(f(W_v·h + b_v)) - f(W_y·h + b_y), f being the model's own scaling
or soft cap of logits. The vocabulary is walked in blocks with a running logsumexp, so at most `chunk` float32 logits
exist at once (Gemma 3: 262,144 words x 500 positions would be 524 MB, and as much again for the softmax). The backward
pass computes the blocks again. Matmuls run in the weights' dtype, everything after them in float32.

torch's own float32 cross_entropy is biased for large vocabularies (its sum of exponentials rounds): 1.5e-5 nats a token
on random logits over 262,144 words against float64, up to 3.8e-5; this one 6e-8 on average and 2e-6 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK = 1 << 23
"""float32 logits held at once (32 MiB)."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to its logits after the head: z -> cap * tanh(z * scale / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return float32 logits; may work in place on a float32 input."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, mapped: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the raw logits, from the mapped ones."""
        if self.cap is not None:
            grad = grad * (1 - (mapped / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


def logit_map(config: Any) -> LogitMap:
    """Read final soft cap (Gemma 2), logit_scale (Cohere) and logits_scaling (Granite divides by it) from a config."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if str(text.model_type).startswith("cohere"):
        scale = float(text.logit_scale)
    elif str(text.model_type).startswith("granite"):
        scale = 1.0 / float(text.logits_scaling)
    return LogitMap(scale, getattr(text, "final_logit_softcapping", None))


@dataclass(frozen=True)
class HeadStats:
    """Per position, each (S,) float32: logsumexp, label's logit, mean logit, logsumexp of twice the logits, entropy.

    The entropy is that of the prediction, −Σ p log p in nats.
    """

    lse: Tensor
    label: Tensor
    mean: Tensor
    lse_twice: Tensor
    entropy: Tensor

    @property
    def error_norm(self) -> Tensor:
        """‖softmax(z) − onehot(y)‖₂ = √(Σ p² − 2·p_y + 1), in [0, √2]; needs `with_squares`."""
        squares = torch.exp(self.lse_twice - 2 * self.lse)
        return (squares - 2 * torch.exp(self.label - self.lse) + 1).clamp_(min=0).sqrt_()


def stats_of_logits(logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, size: int) -> HeadStats:
    """All of `HeadStats` from any function of hidden states to logits, `size` positions at a time; no gradient."""
    parts: list[tuple[Tensor, ...]] = []
    for i in range(0, len(labels), max(1, size)):
        z, y = logits(hidden[i : i + max(1, size)]).float(), labels[i : i + max(1, size), None]
        entropy = torch.special.entr(z.softmax(1)).sum(1)
        parts.append((z.logsumexp(1), z.gather(1, y)[:, 0], z.mean(1), (2 * z).logsumexp(1), entropy))
    empty = [(hidden.new_zeros(0, dtype=torch.float32),) * 5]
    return HeadStats(*(torch.cat(column) for column in zip(*(parts or empty), strict=True)))


def _blocks(vocabulary: int, positions: int, chunk: int) -> list[tuple[int, int]]:
    width = max(256, min(vocabulary, chunk // max(1, positions)))
    return [(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mapping: LogitMap) -> Tensor:
    return mapping(nn.functional.linear(hidden, weight, bias))


def head_stats(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mapping: LogitMap = LogitMap(),
    *,
    chunk: int = CHUNK,
    with_mean: bool = False,
    with_squares: bool = False,
    with_entropy: bool = False,
) -> HeadStats:
    """Walk the vocabulary once; no gradient.

    Args:
        hidden: (S, d) final hidden states.
        labels: (S,) next tokens.
        weight: (V, d) rows of the head.
        bias: (V,) or None.
        mapping: what happens to logits afterwards.
        chunk: float32 logits held at once.
        with_mean: also the mean logit (label smoothing needs it); zeros otherwise.
        with_squares: also logsumexp of twice the logits (`error_norm` needs it); -inf otherwise.
        with_entropy: also the entropy, from Σ e^(z − lse) (lse − z), its terms carried along as lse grows; else zeros.
    """
    n, vocabulary = hidden.shape[0], weight.shape[0]
    lse = torch.full((n,), float("-inf"), device=hidden.device)
    label, total, twice, entropy = torch.zeros_like(lse), torch.zeros_like(lse), lse.clone(), torch.zeros_like(lse)
    for start, end in _blocks(vocabulary, n, chunk):
        z = _logits(hidden, weight[start:end], None if bias is None else bias[start:end], mapping)
        inside = (labels >= start) & (labels < end)
        picked = z.gather(1, (labels - start).clamp_(0, end - start - 1)[:, None])[:, 0]
        label = torch.where(inside, picked, label)
        if with_mean:
            total += z.sum(1)
        top = torch.maximum(lse, z.amax(1))
        z.sub_(top[:, None])
        below = z.clamp(min=-1e4) if with_entropy else None  # a logit of -inf has weight 0
        part = z.exp_().sum(1)
        before, lse = lse, top + torch.log(part + torch.exp(lse - top))
        if below is not None:
            kept = torch.exp(before - lse)
            entropy = torch.where(kept > 0, kept * (entropy + lse - before), 0.0)
            entropy += torch.exp(top - lse) * (part * (lse - top) - below.mul_(z).sum(1))
        if with_squares:
            twice = torch.logaddexp(twice, 2 * top + torch.log(z.square_().sum(1)))
    return HeadStats(lse, label, total / vocabulary, twice, entropy)


class _Nll(torch.autograd.Function):
    """nll with the blocks computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mapping: LogitMap,
        chunk: int,
    ) -> Tensor:
        stats = head_stats(hidden, labels, weight, bias, mapping, chunk=chunk)
        ctx.save_for_backward(hidden, weight, bias, labels, stats.lse)
        ctx.mapping, ctx.chunk = mapping, chunk
        return stats.lse - stats.label

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        rows = torch.arange(len(labels), device=labels.device)
        for start, end in _blocks(weight.shape[0], len(labels), ctx.chunk):
            block = weight[start:end]
            z = _logits(hidden, block, None if bias is None else bias[start:end], ctx.mapping)
            g = torch.exp(z - lse[:, None])
            inside = (labels >= start) & (labels < end)
            g[rows, (labels - start).clamp_(0, end - start - 1)] -= inside.to(g.dtype)
            g = ctx.mapping.backward(z, g * grad[:, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden.addmm_(g, block)
            if d_weight is not None:
                torch.mm(g.T, hidden, out=d_weight[start:end])
            if d_bias is not None:
                d_bias[start:end] = g.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None


def nll(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    mapping: LogitMap = LogitMap(),
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Negative log-likelihood of each label in nats, (S,) float32, differentiable in hidden states and head.

    A head that is not a plain linear layer (a LoRA on it, a saved copy) is called as a module on blocks of positions,
    with recomputation in backward.
    """
    if type(head) is nn.Linear:
        return _Nll.apply(hidden, head.weight, head.bias, labels, mapping, chunk)

    return nll_in_parts(
        lambda h: mapping(head(h)), hidden, labels, chunk // int(getattr(head, "out_features", 1 << 16))
    )


def nll_in_parts(logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, size: int) -> Tensor:
    """The same from any function of hidden states (s, d) to logits (s, V), `size` positions at a time."""

    def part(h: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(h).float(), y, reduction="none")

    size = max(1, size)
    pieces = [
        checkpoint(part, hidden[i : i + size], labels[i : i + size], use_reentrant=False)
        if torch.is_grad_enabled()
        else part(hidden[i : i + size], labels[i : i + size])
        for i in range(0, len(labels), size)
    ]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


class _Given(BaseModelOutputWithPast):
    """What a decoder returns, with None for the fields of other architectures."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def after_decoder(model: Any, decoder: nn.Module, hidden: Tensor) -> Tensor:
    """Run a causal LM's own code on given final hidden states: its decoder returns them in the place of its own.

    So scaling, soft caps, multipliers and layers between decoder and logits are the model's, whatever they are.
    `hidden` is (S, d). Returns (S, V) logits.
    """
    given = _Given(last_hidden_state=hidden[None])
    decoder.forward = lambda *args, **kwargs: given
    try:
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del decoder.forward
