"""Per-example gradients inside one batched backward pass.

`recorded` holds what one layer does: its gradient for row i is a product over that row's positions alone, and goes to a
`Sink` as two factors. Frozen weights get no gradient, and nothing runs below the lowest recorded layer's input. The
output head runs at supervised positions only, forward and gradient in one go, since the weight of each token's loss is
known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepset.errors import ModelError
from keepset.features.gradient_check import own_gradient, unlike
from keepset.features.recorded import Recorder, Sink, hand_factors, products, recorded_forward
from keepset.model import head
from keepset.model.layout import Places, lay_out
from keepset.model.linears import find_linears
from keepset.model.llama_backward import LlamaPass
from keepset.model.llama_blocks import serves
from keepset.model.pack import (
    Batch,
    Row,
    bare,
    engine,
    full_span,
    last_hidden,
    own_logits,
    pack,
    row_counts,
    token_nll,
    vocabulary,
)
from keepset.model.probes import Probe, probes

LOGITS = 1 << 22
"""float32 logits formed at once by `head_gradient` (16 MiB: they stay in cache)."""


@contextmanager
def recording(
    model: nn.Module,
    *,
    matrices: Sequence[str] | None = None,
    last_layers: int | None = None,
    written: bool = True,
) -> Iterator[Recorder]:
    """Replace the recorded layers' `forward` and freeze everything; both are undone afterwards.

    With the adapter off (`disable_adapter()`) a LoRA layer runs its own forward and nothing is recorded. For the model
    and its matrices see `find_linears`. `written` False: always autograd, the same numbers.
    """
    linears = find_linears(model, matrices=matrices, last_layers=last_layers)
    recorded = {name: linear for name, linear in linears.items() if linear.recorded}
    recorder = Recorder(recorded, torch.zeros(0, device=next(model.parameters()).device, requires_grad=True))
    output = bare(model).get_output_embeddings()
    recorder.head = next((linear for linear in recorded.values() if linear.module is output), None)
    how = engine(model)
    recorder.packed, recorder.span, recorder.apart = how.packed, full_span(model), how.apart
    recorder.linear_head = how.head == "linear" and type(output) is nn.Linear
    if recorder.head is not None and how.head != "linear":
        raise ModelError("the head's own gradients can't be recorded: this model works on its logits in its own code")
    if written and recorder.packed and recorder.head is None and serves(model, linears):
        recorder.written = LlamaPass(model, linears)
    probe = _probe_of(model, recorder)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    for linear in recorded.values():
        linear.module.forward = recorded_forward(linear, recorder)
    try:
        _verify(model, recorder, probe)
        yield recorder
    finally:
        for linear in recorded.values():
            del linear.module.forward
        for p in trainable:
            p.requires_grad_(True)


def _probe_of(model: nn.Module, recorder: Recorder) -> tuple[list[Probe], dict[str, Tensor]]:
    """Two probes and the second one's gradient by plain autograd; nothing if these matrices were verified before."""
    seen: set[Any] = vars(bare(model)).setdefault("keepset_verified", set())
    key = (tuple(recorder.shapes), recorder.packed, recorder.written is not None)
    if key in seen:
        return [], {}
    seen.add(key)
    rows = probes(model)[-2:]
    return rows, dict(zip(recorder.shapes, own_gradient(model, rows[-1], list(recorder.shapes)), strict=True))


def _verify(model: nn.Module, recorder: Recorder, probe: tuple[list[Probe], dict[str, Tensor]]) -> None:
    """Hold the engine's gradient of a probe against plain autograd's.

    Raises:
        ModelError: they differ, as where a layer sees some tokens only (experts) or runs twice in one pass.
    """
    rows, want = probe
    if not rows:
        return
    got: dict[str, Tensor] = {}

    def sink(name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        if name in got:
            raise ModelError(f"{name} is used twice in one pass")
        out = torch.empty(len(rows), left.shape[1], right.shape[1], device=left.device)
        got[name] = products(left, right, places, out)[-1] * scale

    trouble = ""
    try:
        run_rows(model, recorder, rows, mean_weights, sink)
    except (ModelError, RuntimeError, IndexError) as error:
        trouble = f": {error}"
    dtype = next(model.parameters()).dtype
    wrong = unlike(got, want, dtype)
    if wrong:
        vars(bare(model))["keepset_verified"].clear()
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"gradients a row can't be taken of {wrong[0]}{more}: "
            f"they are not autograd's{trouble}; name other lora_target_modules"
        )


class LossWeights(Protocol):
    """Gives each supervised token's factor in the loss."""

    def __call__(self, row_of: Tensor, n: int) -> Tensor:
        """(S,) float32 from the row (0..n−1) of each supervised token."""


def run_rows(
    model: nn.Module,
    recorder: Recorder,
    rows: Sequence[Row],
    weigh: LossWeights,
    sink: Sink,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run rows forward and back together for the loss Σ weight·nll.

    Args:
        model: inside `recording`.
        recorder: what `recording` gave.
        rows: the batch's rows.
        weigh: the loss weights.
        sink: receives every recorded parameter's factors, rows in the order given.
        uniform: (S,) numbers in [0, 1), in row order: each label is then drawn from the model's own distribution by
            inverting its distribution function at the number, instead of the data's next token.

    Returns:
        (S,) float32 token losses in nats and (S,) the row of each, in row order.

    Rows that others would change run one at a time; the sink gets their factors together.
    """
    longest = max(len(r.input_ids) for r in rows)
    if recorder.apart is not None and longest > recorder.apart and len(rows) > 1:
        return _run_apart(model, recorder, rows, weigh, sink, uniform)
    if recorder.written is not None and (recorder.span is None or longest <= recorder.span):
        return _run_written(model, recorder.written, rows, weigh, sink, uniform)
    device = recorder.anchor.device
    batch = pack(rows, np.arange(len(rows)), packed=recorder.packed, device=device)
    recorder.sink, recorder.places = sink, Places(batch.lengths, batch.offsets)
    weights = weigh(batch.row_of, len(rows))
    try:
        with torch.enable_grad():
            return _run_autograd(model, recorder, batch, weights, uniform), batch.row_of
    finally:
        recorder.sink = recorder.places = recorder.head_places = None


def _run_apart(
    model: nn.Module,
    recorder: Recorder,
    rows: Sequence[Row],
    weigh: LossWeights,
    sink: Sink,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    counts = [int(np.count_nonzero(row.supervised)) for row in rows]
    row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)).to(recorder.anchor.device)
    weights = weigh(row_of, len(rows)).split(counts)
    drawn = [None] * len(rows) if uniform is None else uniform.split(counts)
    factors: dict[str, list[tuple[Tensor, Tensor, float, int]]] = {}

    def keep(name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        factors.setdefault(name, []).append((left, right, scale, places.lengths[0]))

    losses = [
        run_rows(model, recorder, [row], lambda _row_of, _n, own=own: own, keep, u)[0]
        for row, own, u in zip(rows, weights, drawn, strict=True)
    ]
    with torch.no_grad():
        for name, parts in factors.items():
            left, right, scales, lengths = zip(*parts, strict=True)
            places = Places(list(lengths), (np.cumsum(lengths) - lengths).tolist())
            sink(name, torch.cat(left), torch.cat(right), scales[0], places)
    return torch.cat(losses), row_of


def _run_written(
    model: nn.Module,
    written: LlamaPass,
    rows: Sequence[Row],
    weigh: LossWeights,
    sink: Sink,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    placed = lay_out(rows)
    hidden, tape = written.forward(placed)
    inner = bare(model)
    weights = weigh(placed.row_of, len(rows))
    nll, grad = head_gradient(hidden, placed.labels, weights, inner.get_output_embeddings(), inner.config, uniform)
    written.backward(placed, tape, grad, partial(hand_factors, sink))
    return nll, placed.row_of


def _run_autograd(
    model: nn.Module, recorder: Recorder, batch: Batch, weights: Tensor, uniform: Tensor | None
) -> Tensor:
    inner = bare(model)
    output = inner.get_output_embeddings()
    hidden = last_hidden(model, batch)
    if uniform is not None and (recorder.head is not None or not recorder.linear_head):
        batch = replace(batch, labels=_drawn_labels(model, hidden[batch.predict], uniform))
    if recorder.head is not None:
        counts = np.bincount(batch.row_of.cpu().numpy(), minlength=len(batch.lengths))
        recorder.head_places = Places(counts.tolist(), (np.cumsum(counts) - counts).tolist())
        nll = F.cross_entropy(
            head.logit_map(inner.config)(output(hidden[batch.predict])), batch.labels, reduction="none"
        )
    elif not recorder.linear_head:
        nll = token_nll(model, batch, hidden=hidden)
    else:
        states = hidden.detach()[batch.predict]
        nll, grad = head_gradient(states, batch.labels, weights, output, inner.config, uniform)
        hidden.backward(torch.zeros_like(hidden).index_add_(0, batch.predict, grad))
        return nll
    (nll * weights).sum().backward()
    return nll.detach()


def mean_weights(row_of: Tensor, n: int) -> Tensor:
    """(S,) one over the number of supervised tokens of each token's row: the mean-token loss of each row."""
    return sum_weights(row_of, n) / row_counts(row_of, n)[row_of]


def sum_weights(row_of: Tensor, n: int) -> Tensor:
    """(S,) ones: the summed loss."""
    return torch.ones(len(row_of), device=row_of.device)


@torch.no_grad()
def head_gradient(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    output: nn.Linear,
    config: Any,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token losses and the gradient of Σ weights·nll with respect to the hidden states, the logits formed once.

    `hidden` (S, d) are final states at predicting positions, `labels` (S,) next tokens, `weights` (S,) each loss's
    factor; the model's soft cap and logit scale are honoured. `uniform` (S,) in [0, 1) draws the labels from the model
    instead, see `run_rows`.

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
        y = labels[part, None] if uniform is None else _drawn(z, lse, uniform[part, None])
        nll[part] = (lse - z.gather(1, y))[:, 0]
        g = z.sub(lse).exp_() if mapping.cap is not None else z.sub_(lse).exp_()
        g.scatter_add_(1, y, torch.full_like(lse, -1.0))
        g.mul_(weights[part, None])
        grad[part] = mapping.backward(z, g).to(hidden.dtype) @ weight
    return nll, grad


@torch.no_grad()
def _drawn_labels(model: nn.Module, hidden: Tensor, uniform: Tensor) -> Tensor:
    """(S,) labels drawn from the logits that the model's own code makes of the hidden states (S, d)."""
    size = max(1, head.CHUNK // vocabulary(model))
    parts = []
    for h, u in zip(hidden.split(size), uniform[:, None].split(size), strict=True):
        z = own_logits(model, h).float()
        parts.append(_drawn(z, z.logsumexp(1, keepdim=True), u)[:, 0])
    return torch.cat(parts)


def _drawn(z: Tensor, lse: Tensor, uniform: Tensor) -> Tensor:
    """(s, 1) labels at which the distribution function of softmax(z) passes the uniform numbers (s, 1)."""
    below = z.sub(lse).exp_().double().cumsum(1)
    return torch.searchsorted(below, uniform.double()).clamp_(max=z.shape[1] - 1)
