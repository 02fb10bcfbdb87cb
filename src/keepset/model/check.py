"""A model is checked against transformers before keepset scores anything with it.

A few short rows of random tokens run through the checkpoint as transformers runs it by default (its own
attention, its own code after the decoder, one row at a time), and through keepset's engine. Losses of every token and
final hidden states must agree. What is tried, in this order, until one does:

    packed, keepset's attention          rows in one sequence without padding, beginnings they share run once
    padded, the model's own attention    right padding with an attention mask
    one row at a time                    the model's own attention, no padding

each with the output head as one linear map (in blocks of the vocabulary) or, where the model does more after its
decoder, with the model's own code. If none agrees the architecture is refused. So attention sinks, soft caps, ALiBi,
convolutions, recurrent states, multipliers and heads with layers of their own are right or refused.

What rows this short can't show is read from the configuration: each layer must hand keepset's attention the window that
`layer_types` says, and positions that depend on the longest row of a batch (LongRoPE) make rows beyond the limit run
alone. Per-row gradients are compared with autograd's, row by row, when a model's matrices are first recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from keepset.errors import ModelError, first_line
from keepset.model import attention, head
from keepset.model import pack as packing
from keepset.model.pack import Engine
from keepset.model.passes import Passes
from keepset.model.probes import SHARING, Probe, Truth, close, name_of, off, probes, tolerance
from keepset.stopping import out_of_memory

log = logging.getLogger(__name__)


def check(model: Any, known: Engine | None = None) -> Engine:
    """Find out how a model's rows are to be run, note it on the model and return it.

    Where keepset's attention doesn't give the model's own numbers, transformers' default is set again. `known` is what
    was found for the same weights before: it is noted, and nothing is run.

    Raises:
        ModelError: nothing that keepset can do gives transformers' own losses.
    """
    inner = packing.bare(model)
    training, attn = inner.training, inner.config._attn_implementation
    if known is not None:
        if attn == attention.NAME and not known.packed:
            inner.set_attn_implementation(inner.get_correct_attn_implementation(None))
        inner.keepset_engine = known
        return known
    inner.eval()
    try:
        with torch.no_grad(), _own_attention(inner):
            rows = probes(inner)
            truth = Truth(inner, rows)
        engine = _first_that_agrees(model, rows, truth, attn == attention.NAME)
    finally:
        inner.train(training)
    inner.keepset_engine = engine
    return engine


@contextmanager
def _own_attention(inner: Any) -> Iterator[None]:
    """Transformers' default attention for this architecture in the place of keepset's."""
    if inner.config._attn_implementation != attention.NAME:
        yield
        return
    inner.set_attn_implementation(inner.get_correct_attn_implementation(None))
    try:
        yield
    finally:
        inner.set_attn_implementation(attention.NAME)


def _first_that_agrees(model: Any, rows: list[Probe], truth: Truth, packable: bool) -> Engine:
    inner = packing.bare(model)
    # A model of eager attention only has something that sdpa can't do (sinks, soft caps); so has one whose code does
    # not ask the attention interface.
    default = inner.get_correct_attn_implementation(None)
    packable = packable and default == "sdpa" and inner._can_set_attn_implementation()
    heads = {name: kind for name in truth.states if (kind := _head(inner, name, rows, truth))}
    limit = _position_limit(inner)
    worst = float("inf")
    for packed, apart in [*([(True, limit)] if packable else []), (False, limit), (False, 0)]:
        if not packed and inner.config._attn_implementation == attention.NAME:
            inner.set_attn_implementation(default)
        for decoder, kind in heads.items():
            engine = Engine(packed, kind, decoder, apart)
            error = _error(model, engine, rows, truth)
            worst = min(worst, error)
            if error <= 1:
                return engine
    raise ModelError(
        f"{name_of(inner)}: keepset's losses do not agree with transformers' own forward pass for this architecture, "
        "so nothing can be scored with it"
        + (f" (off by {worst:.3g} times the tolerance)" if np.isfinite(worst) else "")
    )


def _head(inner: Any, decoder: str, rows: list[Probe], truth: Truth) -> Any:
    """Which head makes the model's losses of this module's states: `linear`, `own`, or None."""
    labels = torch.cat([torch.as_tensor(r.input_ids[r.prompt :], dtype=torch.long, device=inner.device) for r in rows])
    states = torch.cat([x[r.prompt - 1 : -1] for r, x in zip(rows, truth.states[decoder], strict=True)])
    output, mapping, share = inner.get_output_embeddings(), head.logit_map(inner.config), _loss_tolerance(inner, truth)
    with torch.no_grad():
        try:
            own = {size: head.after_decoder(inner, inner.get_submodule(decoder), states * size) for size in (1, 50)}
        except Exception as error:  # a model that does not call this module, or wants more of it
            log.debug("%s: its head can't be run alone: %s", name_of(inner), first_line(error))
            return None
        nll = nn.functional.cross_entropy(own[1].float(), labels, reduction="none")
        if not close(nll, torch.cat(truth.nll), share):
            return None
        try:  # also at fifty times the size: a soft cap far above a small model's logits would not be seen
            if output is not None and all(close(mapping(output(states * k)), z, share) for k, z in own.items()):
                return "linear"
        except RuntimeError as error:  # layers between the states and the output embeddings: another width
            log.debug("%s: no linear head: %s", name_of(inner), first_line(error))
    return "own"


def _loss_tolerance(inner: Any, truth: Truth) -> float:
    short = inner.dtype not in (torch.float32, torch.float64)
    return tolerance(inner.dtype) * (truth.scale if short else 1.0)


def _error(model: Any, engine: Engine, rows: list[Probe], truth: Truth) -> float:
    """The engine's largest error over its tolerance: token losses, hidden states, and windows of the attention."""
    inner = packing.bare(model)
    share = _loss_tolerance(inner, truth)
    inner.keepset_engine = engine
    try:
        windows: dict[int, int | None] = {}
        with torch.no_grad(), _spied(windows):
            worst = off(_losses(model, rows), torch.cat(truth.nll), share)
            for packed in {engine.packed, False}:
                unshared = rows[SHARING:]
                batch = packing.pack(unshared, np.arange(len(unshared)), packed=packed, device=inner.device)
                flat = packing.last_hidden(model, batch)
                got = torch.cat([flat[o : o + n] for o, n in zip(batch.offsets, batch.lengths, strict=True)])
                want = torch.cat(truth.states[engine.decoder][SHARING:])
                size = float(want.float().pow(2).mean().sqrt())  # hidden states have no scale of their own
                worst = max(worst, off(got / size, want / size, 4 * tolerance(inner.dtype)))
        if engine.packed and not _windows_agree(inner, windows):
            log.debug("%s: windows %s are not the configuration's", name_of(inner), windows)
            return float("inf")
        return worst
    except Exception as error:  # an architecture that can't be run this way
        if out_of_memory(error):
            raise
        log.debug("%s, %s: %s", name_of(inner), engine, first_line(error))
        return float("inf")
    finally:
        del inner.keepset_engine


def _losses(model: Any, rows: list[Probe]) -> Tensor:
    """The engine's token losses (S,) in nats, in the order of the rows."""
    passes = Passes(model, rows)
    by_row: dict[int, Tensor] = {}
    for index, prefix in passes.batches(1 << 20):
        batch, (nll,) = passes.run(index, prefix, lambda h, y: packing.nll_at(model, h, y))
        by_row |= {int(i): nll[batch.row_of == k] for k, i in enumerate(index)}
    return torch.cat([by_row[i] for i in range(len(rows))])


@contextmanager
def _spied(windows: dict[int, int | None]) -> Iterator[None]:
    """Note the window each layer hands to keepset's packed attention."""

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("keepset_segments") is not None:
            windows[int(getattr(module, "layer_idx", None) or 0)] = kwargs.get("sliding_window")
        return attention.keepset_attention(module, *args, **kwargs)

    AttentionInterface.register(attention.NAME, spy)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, attention.keepset_attention)


def _windows_agree(inner: Any, windows: dict[int, int | None]) -> bool:
    """Whether packed attention was told what each layer may see: probes are shorter than most windows."""
    config = inner.config.get_text_config()
    window = packing.sliding_window(config)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        max(windows, default=-1) + 1
    )
    allowed = {"full_attention": (None,), "sliding_attention": (window,)}
    return all(
        layer < len(kinds) and (handed or None) in allowed.get(kinds[layer], ()) for layer, handed in windows.items()
    )


def _position_limit(inner: Any) -> int | None:
    """The longest row that no other row of its batch changes.

    LongRoPE picks its factors by the longest; sparse attention that keeps the best k tokens breaks ties by where they
    stand in the batch.
    """
    config = inner.config.get_text_config()
    limits = [v for name in ("index_topk", "indexer_budget") if type(v := getattr(config, name, None)) is int]
    if type(blocks := getattr(config, "index_topk_blocks", None)) is int:
        limits.append(blocks * int(config.index_block_size))
    for module in inner.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                parameters = module.config.rope_parameters
                own = parameters[layer_type] if layer_type else parameters
                limits.append(int(own["original_max_position_embeddings"]))
            elif kind == "dynamic":
                limits.append(int(module.original_max_seq_len))
    return min(limits, default=None)
