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
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from keepset.errors import ModelError, first_line
from keepset.features.losses import row_losses
from keepset.model import attention, head
from keepset.model import pack as packing
from keepset.model.kind import UNMASKED
from keepset.model.pack import Engine
from keepset.stopping import out_of_memory

log = logging.getLogger(__name__)

SHARING = 4
"""So many probes share a beginning: enough for keepset to run it once."""

LONGEST_PROBE = 128
SHORT_SIGHT = re.compile("window|chunk|topk|budget|block|span|kernel")
"""Configuration values of these names, up to `LONGEST_PROBE`, get longer probes: what a token sees may end there."""


@dataclass(frozen=True)
class Probe:
    """A row of random tokens; the first `prompt` are not supervised."""

    input_ids: np.ndarray
    prompt: int = 1

    @property
    def supervised(self) -> np.ndarray:
        """(L,) bool."""
        return np.arange(len(self.input_ids)) >= self.prompt


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of summation may lie apart, as a share: 1e-4 in float32, a few bits in shorter formats."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 16 * torch.finfo(dtype).eps


def probes(model: Any, seed: int = 0) -> list[Probe]:
    """Rows that share a beginning, and two longer than a short sliding window; no special tokens."""
    inner = packing.bare(model)
    config = inner.config.get_text_config()
    special = {v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index")) and type(v) is int}
    size = min(packing.vocabulary(inner), getattr(config, "vocab_size", None) or packing.vocabulary(inner))
    words = np.setdiff1d(np.arange(3, size), sorted(special))
    if len(words) < 8:
        raise ModelError(f"{_name(inner)}: a vocabulary of {size} tokens is too small to be checked")
    rng = np.random.default_rng(seed)
    reach = [
        v for k, v in config.to_dict().items() if type(v) is int and SHORT_SIGHT.search(k) and 0 < v <= LONGEST_PROBE
    ]
    long = max([8, *(v + 9 for v in reach)])
    context = getattr(config, "max_position_embeddings", None)
    long = min(long, context - 4) if type(context) is int and context > 12 else long
    common = rng.choice(words, 9)
    own = [rng.choice(words, n) for n in (2, 4)]
    rows = [Probe(np.concatenate([common, x]), len(common)) for x in own]
    # Each of these stands there twice, and costs the model's own pass once. Then two long rows: beyond the windows, and
    # one of them padded to the other's length.
    return [*rows * (SHARING // 2), *(Probe(rng.choice(words, n)) for n in (long + 4, long))]


def check(model: Any, known: Engine | None = None) -> Engine:
    """Find out how a model's rows are to be run, note it on the model and return it.

    Args:
        model: a causal LM or a PeftModel around one; where its attention is set to keepset's and that does not give the
            model's own numbers, transformers' default is set again.
        known: what was found for the same weights before; it is noted on the model, and nothing is run.

    Raises:
        ModelError: nothing that keepset can do gives transformers' own losses.
    """
    inner = packing.bare(model)
    training, wanted = inner.training, inner.config._attn_implementation
    if known is not None:
        if wanted == attention.NAME and not known.packed:
            inner.set_attn_implementation(inner.get_correct_attn_implementation(None))
        inner.keepset_engine = known
        return known
    inner.eval()
    try:
        with torch.no_grad(), _own_attention(inner):
            rows = probes(inner)
            truth = _Truth(inner, rows)
        engine = _first_that_agrees(model, rows, truth, wanted == attention.NAME)
    finally:
        inner.train(training)
    inner.keepset_engine = engine
    return engine


def _name(inner: Any) -> str:
    return f"{inner.config._name_or_path or type(inner).__name__} ({inner.config.model_type})"


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


class _Truth:
    """What the model itself says about the probes: a row at a time, its own forward pass from end to end.

    Attributes:
        nll: each row's losses at its supervised tokens, in nats.
        states: by the name of each module that may be the decoder, each row's final hidden states (L, d).
        scale: largest logit by magnitude, for tolerances of short formats.
    """

    def __init__(self, inner: Any, rows: Sequence[Probe]) -> None:
        self.states: dict[str, list[Any]] = {name: [] for name in _decoders(inner)}
        hooks = [
            inner.get_submodule(name).register_forward_hook(
                lambda _module, _args, out, name=name: self.states[name].append(_final(out))
            )
            for name in self.states
        ]
        self.nll, self.scale, beginnings = [], 1.0, []
        different = {row.input_ids.tobytes(): row for row in rows}
        try:
            for row in different.values():
                logits = _logits(inner, row.input_ids)
                labels = torch.as_tensor(row.input_ids, device=logits.device)[1:, None]
                nll = -logits[:-1].log_softmax(-1).gather(1, labels)[:, 0]
                self.nll.append(nll[torch.as_tensor(row.supervised[1:], device=nll.device)])
                beginnings.append(logits[: row.prompt])
                self.scale = max(self.scale, float(logits.abs().max()))
            if not all(bool(torch.isfinite(x).all()) for x in self.nll):
                raise ModelError(f"{_name(inner)}: the model's losses are not finite; {_why_not_finite(inner)}")
        finally:
            for hook in hooks:
                hook.remove()
        # Rows that share a beginning: what follows must not change it.
        if not _close(beginnings[1], beginnings[0], tolerance(inner.dtype)):
            raise ModelError(f"{_name(inner)}: {type(inner).__name__} is not causal: {UNMASKED}")
        places = [list(different).index(row.input_ids.tobytes()) for row in rows]
        self.nll = [self.nll[i] for i in places]
        self.states = {
            k: [v[i] for i in places]
            for k, v in self.states.items()
            if len(v) == len(different) and all(x is not None for x in v)
        }


def _why_not_finite(inner: Any) -> str:
    """What to do about it: weights that are not finite are the checkpoint's fault."""
    for name, parameter in inner.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} of the checkpoint is not: get it again"
    return "try dtype: float32" if inner.dtype != torch.float32 else "the checkpoint's weights are too large"


def _logits(inner: Any, ids: np.ndarray) -> Tensor:
    """The model's own logits (L, V) of one row, float32."""
    try:
        out = inner(input_ids=torch.as_tensor(ids, dtype=torch.long, device=inner.device)[None], use_cache=False).logits
    except Exception as error:  # whatever a foreign architecture raises
        raise ModelError(f"{_name(inner)}: transformers can't run it on plain text: {first_line(error)}") from error
    if out.ndim != 3 or out.shape[:2] != (1, len(ids)):
        raise ModelError(
            f"{_name(inner)}: gives logits of shape {tuple(out.shape)} for {len(ids)} tokens, not one a token"
        )
    return out[0].float()


def _final(out: Any) -> Tensor | None:
    states = getattr(out, "last_hidden_state", None)
    return states[0] if isinstance(states, Tensor) and states.ndim == 3 else None


def _decoders(inner: Any) -> list[str]:
    """Names of the modules that may make the final hidden states: what transformers calls the decoder, and the models
    inside the model."""
    named = {id(m): n for n, m in inner.named_modules() if n}
    found = [name for name, module in inner.named_children() if isinstance(module, PreTrainedModel)]
    try:
        found.insert(0, named.get(id(inner.get_decoder()), ""))
    except Exception as error:  # get_decoder guesses, and fails in its own ways
        log.debug("no decoder: %s", first_line(error))
    return list(dict.fromkeys(name for name in found if name))


def _first_that_agrees(model: Any, rows: list[Probe], truth: _Truth, packable: bool) -> Engine:
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
        f"{_name(inner)}: keepset's losses do not agree with transformers' own forward pass for this architecture, so "
        "nothing can be scored with it" + (f" (off by {worst:.3g} times the tolerance)" if np.isfinite(worst) else "")
    )


def _head(inner: Any, decoder: str, rows: list[Probe], truth: _Truth) -> Any:
    """Which head makes the model's losses of this module's states: `linear`, `own`, or None."""
    labels = torch.cat([torch.as_tensor(r.input_ids[r.prompt :], dtype=torch.long, device=inner.device) for r in rows])
    states = torch.cat([x[r.prompt - 1 : -1] for r, x in zip(rows, truth.states[decoder], strict=True)])
    output, mapping, share = inner.get_output_embeddings(), head.logit_map(inner.config), _loss_tolerance(inner, truth)
    with torch.no_grad():
        try:
            own = {size: head.after_decoder(inner, inner.get_submodule(decoder), states * size) for size in (1, 50)}
        except Exception as error:  # a model that does not call this module, or wants more of it
            log.debug("%s: its head can't be run alone: %s", _name(inner), first_line(error))
            return None
        nll = nn.functional.cross_entropy(own[1].float(), labels, reduction="none")
        if not _close(nll, torch.cat(truth.nll), share):
            return None
        try:  # also at fifty times the size: a soft cap far above a small model's logits would not be seen
            if output is not None and all(_close(mapping(output(states * k)), z, share) for k, z in own.items()):
                return "linear"
        except RuntimeError as error:  # layers between the states and the output embeddings: another width
            log.debug("%s: no linear head: %s", _name(inner), first_line(error))
    return "own"


def _loss_tolerance(inner: Any, truth: _Truth) -> float:
    short = inner.dtype not in (torch.float32, torch.float64)
    return tolerance(inner.dtype) * (truth.scale if short else 1.0)


def _close(got: Tensor, want: Tensor, share: float) -> bool:
    return _off(got, want, share) <= 1


def _off(got: Tensor, want: Tensor, share: float) -> float:
    """Largest difference over share · (1 + magnitude); infinite for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    off = ((got.float() - want.float()).abs() / (share * (1 + want.float().abs()))).max()
    return float(off) if torch.isfinite(off) else float("inf")


def _error(model: Any, engine: Engine, rows: list[Probe], truth: _Truth) -> float:
    """The engine's largest error over its tolerance: token losses, hidden states, and windows of the attention."""
    inner = packing.bare(model)
    share = _loss_tolerance(inner, truth)
    inner.keepset_engine = engine
    try:
        windows: dict[int, int | None] = {}
        with torch.no_grad(), _spied(windows):
            made = row_losses(model, rows, token_budget=1 << 20, per_token=True)
            assert made.token_nll is not None
            losses = torch.from_numpy(np.concatenate(made.token_nll[0]))
            worst = _off(losses, torch.cat(truth.nll).cpu(), share)
            for packed in {engine.packed, False}:
                some = rows[SHARING:]
                batch = packing.pack(some, np.arange(len(some)), packed=packed, device=inner.device)
                flat = packing.last_hidden(model, batch)
                got = torch.cat([flat[o : o + n] for o, n in zip(batch.offsets, batch.lengths, strict=True)])
                want = torch.cat(truth.states[engine.decoder][SHARING:])
                size = float(want.float().pow(2).mean().sqrt())  # hidden states have no scale of their own
                worst = max(worst, _off(got / size, want / size, 4 * tolerance(inner.dtype)))
        if engine.packed and not _windows_agree(inner, windows):
            log.debug("%s: windows %s are not the configuration's", _name(inner), windows)
            return float("inf")
        return worst
    except Exception as error:  # an architecture that can't be run this way
        if out_of_memory(error):
            raise
        log.debug("%s, %s: %s", _name(inner), engine, first_line(error))
        return float("inf")
    finally:
        del inner.keepset_engine


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
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        max(windows, default=-1) + 1
    )
    allowed = {"full_attention": (None,), "sliding_attention": (window,)}
    return all(
        layer < len(kinds) and (told or None) in allowed.get(kinds[layer], ()) for layer, told in windows.items()
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


def own_gradient(model: Any, row: Probe, names: Sequence[str]) -> list[Tensor]:
    """The gradient of a row's mean token loss by autograd through the model's own forward pass, one tensor a name."""
    inner = packing.bare(model)
    chosen = [model.get_parameter(name) for name in names]
    before = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = _logits(inner, row.input_ids)[row.prompt - 1 : -1]
            labels = torch.as_tensor(row.input_ids[row.prompt :], dtype=torch.long, device=logits.device)
            loss = nn.functional.cross_entropy(logits, labels)
            if not loss.requires_grad:
                raise ModelError(f"{_name(inner)}: its own forward pass gives no gradient of {names[0]}")
            return list(torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True))
    finally:
        for p, flag in zip(chosen, before, strict=True):
            p.requires_grad_(flag)


def unlike(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Names whose gradients differ by more than rounding, relative to their own length and a tenth of the whole."""
    whole = float(torch.stack([w.float().norm() for w in want.values()]).norm())

    def far(name: str) -> bool:
        w, g = want[name].float(), got.get(name)
        if g is None or g.shape != w.shape:
            return True
        return not float((g.float() - w).norm()) <= tolerance(dtype) * (float(w.norm()) + 0.1 * whole)

    return [name for name in want if far(name)]
