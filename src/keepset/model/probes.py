"""Short rows of random tokens, and what a model's own forward pass says about them, as transformers runs it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepset.errors import ModelError, first_line
from keepset.model import pack as packing
from keepset.model.kind import UNMASKED

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


def probes(model: Any) -> list[Probe]:
    """Rows that share a beginning, and two longer than a short sliding window; no special tokens."""
    inner = packing.bare(model)
    config = inner.config.get_text_config()
    special = {v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index")) and type(v) is int}
    size = min(packing.vocabulary(inner), getattr(config, "vocab_size", None) or packing.vocabulary(inner))
    words = np.setdiff1d(np.arange(3, size), sorted(special))
    if len(words) < 8:
        raise ModelError(f"{name_of(inner)}: a vocabulary of {size} tokens is too small to be checked")
    rng = np.random.default_rng(0)
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


def name_of(inner: Any) -> str:
    """Where a model came from and its type, for messages."""
    return f"{inner.config._name_or_path or type(inner).__name__} ({inner.config.model_type})"


class Truth:
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
                logits = own_logits(inner, row.input_ids)
                labels = torch.as_tensor(row.input_ids, device=logits.device)[1:, None]
                nll = -logits[:-1].log_softmax(-1).gather(1, labels)[:, 0]
                self.nll.append(nll[torch.as_tensor(row.supervised[1:], device=nll.device)])
                beginnings.append(logits[: row.prompt])
                self.scale = max(self.scale, float(logits.abs().max()))
            if not all(bool(torch.isfinite(x).all()) for x in self.nll):
                raise ModelError(f"{name_of(inner)}: the model's losses are not finite; {_why_not_finite(inner)}")
        finally:
            for hook in hooks:
                hook.remove()
        # Rows that share a beginning: what follows must not change it.
        if not close(beginnings[1], beginnings[0], tolerance(inner.dtype)):
            raise ModelError(f"{name_of(inner)}: {type(inner).__name__} is not causal: {UNMASKED}")
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


def own_logits(inner: Any, ids: np.ndarray) -> Tensor:
    """The model's own logits (L, V) of one row, float32."""
    try:
        out = inner(input_ids=torch.as_tensor(ids, dtype=torch.long, device=inner.device)[None], use_cache=False).logits
    except Exception as error:  # whatever a foreign architecture raises
        raise ModelError(f"{name_of(inner)}: transformers can't run it on plain text: {first_line(error)}") from error
    if out.ndim != 3 or out.shape[:2] != (1, len(ids)):
        raise ModelError(
            f"{name_of(inner)}: gives logits of shape {tuple(out.shape)} for {len(ids)} tokens, not one a token"
        )
    return out[0].float()


def _final(out: Any) -> Tensor | None:
    states = getattr(out, "last_hidden_state", None)
    return states[0] if isinstance(states, Tensor) and states.ndim == 3 else None


def _decoders(inner: Any) -> list[str]:
    """Names of the modules that may make the final hidden states: what transformers calls the decoder, and the models
    inside the model."""
    named = {id(m): n for n, m in inner.named_modules() if n}
    names = [name for name, module in inner.named_children() if isinstance(module, PreTrainedModel)]
    try:
        names.insert(0, named.get(id(inner.get_decoder()), ""))
    except Exception as error:  # get_decoder guesses, and fails in its own ways
        log.debug("no decoder: %s", first_line(error))
    return list(dict.fromkeys(name for name in names if name))


def close(got: Tensor, want: Tensor, share: float) -> bool:
    """Whether no difference is over share · (1 + magnitude)."""
    return off(got, want, share) <= 1


def off(got: Tensor, want: Tensor, share: float) -> float:
    """Largest difference over share · (1 + magnitude); infinite for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    error = ((got.float() - want.float()).abs() / (share * (1 + want.float().abs()))).max()
    return float(error) if torch.isfinite(error) else float("inf")
