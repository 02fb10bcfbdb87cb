"""Forward passes over batches of rows, with a model's LoRA on and off: hidden states where something is predicted.

How they are made cheap: rows are packed without padding and end before their last supervised token, which predicts
nothing; a beginning that many rows share (a system line, a template's first words) is computed once; for the adapter
pass W + s·B·A is formed once, so that it costs what the base pass costs; Llama-like blocks run in `llama_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keepset.errors import ModelError
from keepset.model import pack as packing
from keepset.model.linears import Linear, plain_loras
from keepset.model.llama_blocks import serves
from keepset.model.llama_forward import LlamaForward
from keepset.model.pack import Batch, Row
from keepset.model.prefix import plan

MergedLayer = tuple[Any, Tensor, Tensor]
"""A LoRA layer, its W, and W + s·B·A."""


@dataclass(frozen=True)
class Shortcuts:
    """Which of them are taken where they serve the model; without any, its own forward pass runs every row whole.

    Attributes:
        prefix: a beginning that rows have in common is computed once (CPU, packed).
        merge: LoRA is merged into its weights for the adapter pass.
        written: Llama-like blocks run in `llama_forward`.
    """

    prefix: bool = True
    merge: bool = True
    written: bool = True


EVERY = Shortcuts()


class Passes:
    """The passes over some rows under one model; made once for all batches."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        adapters: tuple[bool, ...] = (True,),
        shortcuts: Shortcuts = EVERY,
    ) -> None:
        """Find out how the rows are run.

        `adapters` are the passes over each batch: True as the model stands, False with its adapter off (a model without
        an adapter gives the same twice).
        """
        self.model, self.rows, self.adapters = model, rows, adapters
        self.packed = packing.supports_packing(model)
        self.device = next(model.parameters()).device
        self.peft = packing.has_adapter(model)
        self.share = shortcuts.prefix and self.packed and self.device.type == "cpu"
        self.span, self.apart = packing.full_span(model), packing.engine(model).apart
        with torch.no_grad():  # not inference_mode: the merged tensors take the place of parameters for a while
            # Also for the base alone: a pass has the same bits whichever others run beside it (a resumed shard needs
            # that).
            self.weights = merged_weights(model) if shortcuts.merge and self.peft else None
            self.written: list[LlamaForward] | None = None
            short = self.span is None or all(len(row.input_ids) <= self.span for row in rows)
            if shortcuts.written and self.packed and short:
                self.written = written_passes(model, adapters, self.weights)

    def batches(self, token_budget: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (indices, length of the shared beginning) of batches of at most `token_budget` tokens."""
        return plan(self.rows, token_budget, share=self.share, span=self.span, apart=self.apart)

    def run(
        self, index: np.ndarray, prefix: int, value: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Batch, list[Tensor]]:
        """Run one batch.

        `index` and `prefix` are of `batches`. `value` makes (S,) numbers of the final hidden states (S, d) at
        predicting positions and the labels (S,), while the pass's adapter is on or off. Returns the batch, and what
        `value` gave in each pass.
        """
        shared = prefix if len(index) > 1 else 0
        batch = packing.pack(
            self.rows, index, packed=self.packed, device=self.device, prefix=shared, trim=True, apart=self.apart
        )
        values = []
        for k, on in enumerate(self.adapters):
            if self.written is not None:  # its head is a plain linear layer, the same with the adapter on and off
                values.append(value(self.written[k](batch), batch.labels))
            else:
                with _pass(self.model, on, self.peft, self.weights):
                    values.append(value(packing.last_hidden(self.model, batch)[batch.predict], batch.labels))
        return batch, values


def written_passes(
    model: Any, adapters: tuple[bool, ...], weights: list[MergedLayer] | None
) -> list[LlamaForward] | None:
    """One `LlamaForward` for each pass, or None where the model's own forward must run."""
    if packing.has_adapter(model) and weights is None:
        return None
    forwards: dict[bool, LlamaForward] = {}
    for on in set(adapters):
        linears = {
            str(place): Linear(module, both if on else base, module.get_base_layer().bias, (), recorded=False)
            for place, (module, base, both) in enumerate(weights or [])
        }
        if not serves(model, linears):
            return None
        forwards[on] = LlamaForward(model, linears)
    return [forwards[on] for on in adapters]


def merged_weights(model: Any) -> list[MergedLayer] | None:
    """Form W + s·B·A of every LoRA layer; None unless all of the adapter is one plain LoRA on float32 linear layers."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        loras = list(plain_loras(model).values())
    except ModelError:  # PEFT's own forward runs what is more than plain LoRA
        return None
    if {id(m) for m in model.modules() if isinstance(m, BaseTunerLayer)} != {id(lora.module) for lora in loras}:
        return None
    out: list[MergedLayer] = []
    embedding = packing.bare(model).get_input_embeddings().weight
    for lora in loras:
        layer, base = lora.module, lora.module.get_base_layer()
        if type(layer) is not LoraLinear or type(base) is not nn.Linear or layer.disable_adapters:
            return None
        # a tied head's weight must not take the embedding along
        if base.weight.dtype != torch.float32 or base.weight is embedding:
            return None
        out.append((layer, base.weight.data, lora.merge(base.weight.data)))
    return out or None


@contextmanager
def _pass(model: Any, on: bool, peft: bool, weights: list[MergedLayer] | None) -> Iterator[None]:
    """Run with the adapter on or off; with merged weights the adapter is off and W or W + s·B·A is in place."""
    if not peft or (on and weights is None):
        yield
        return
    with model.disable_adapter():
        if on and weights is not None:
            for module, _, both in weights:
                module.get_base_layer().weight.data = both
        try:
            yield
        finally:
            if on and weights is not None:
                for module, base, _ in weights:
                    module.get_base_layer().weight.data = base
