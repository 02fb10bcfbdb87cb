"""Which matrices of a model per-example gradients are formed for, and what each linear layer computes.

Served: LoRA (`lora_A`, `lora_B`) on `nn.Linear` and GPT-2's `Conv1D`, any r, alpha and target modules, rsLoRA's scale
included; without LoRA, the weights of chosen `nn.Linear` and `Conv1D` layers. Refused in words: DoRA and other LoRA
variants, several active adapters, adapters on embeddings, fully trained copies (`modules_to_save`), quantised layers, a
chosen head that shares its weight with the input embedding, dropout that would fire.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keepset.errors import ModelError
from keepset.model.pack import bare


@dataclass
class Linear:
    """One recorded linear layer: y = x·Wᵀ + bias with W (out, in), W = W₀ + scale·B·A where there is LoRA.

    Attributes:
        module: the layer whose `forward` is replaced (PEFT's wrapper where there is LoRA).
        weight: (out, in), LoRA merged in; a transposed view for Conv1D.
        bias: (out,) or None.
        names: parameter names (A, B) with LoRA, else (weight,).
        lora: A (r, in), B (out, r) and the scale, or None.
        transposed: the parameter is stored (in, out), as Conv1D's is.
        recorded: whether its gradients are wanted.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    names: tuple[str, ...]
    lora: tuple[Tensor, Tensor, float] | None = None
    transposed: bool = False
    recorded: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shape of each parameter in `names`."""
        if self.lora is not None:
            return [(int(t.shape[0]), int(t.shape[1])) for t in self.lora[:2]]
        out, inner = int(self.weight.shape[0]), int(self.weight.shape[1])
        return [(inner, out) if self.transposed else (out, inner)]


def find_linears(
    model: nn.Module, *, matrices: Sequence[str] | None = None, last_layers: int | None = None
) -> dict[str, Linear]:
    """Return the adapted or chosen layers by module name, in the model's order; LoRA is merged into copies of weights.

    Args:
        model: a PeftModel with one active LoRA, or a bare model with `matrices`.
        matrices: glob patterns of weight names (`*.layers.29.*`) whose full gradients are wanted. None: the LoRA.
        last_layers: only the top so many transformer layers (the head counts as above them all); the backward pass
            stops below them.

    Raises:
        ModelError: nothing to record, or something that can't be served (see the module).
    """
    check_dropout(model)
    linears = _full(model, matrices) if matrices is not None else _lora(model)
    if last_layers is not None:
        total = int(bare(model).config.get_text_config().num_hidden_layers)
        for name, linear in linears.items():
            layer = layer_of(name)
            linear.recorded = layer is None or layer >= total - last_layers
    if not any(linear.recorded for linear in linears.values()):
        raise ModelError("no matrix to take gradients of: the model has no LoRA, or no weight matches `matrices`")
    return linears


def layer_of(name: str) -> int | None:
    """Number of the transformer layer a module belongs to, or None outside the stack."""
    match = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
    return int(match[1]) if match else None


def check_dropout(model: nn.Module) -> None:
    """Refuse dropout that would fire: gradients would depend on chance and on the batch.

    Raises:
        ModelError: the model is in train mode with dropout above 0.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            raise ModelError(f"dropout {module.p} is active at '{name}': call model.eval(), or set it to 0, to score")
        if module.training and float(getattr(module, "attention_dropout", 0) or 0) > 0:
            raise ModelError(f"attention dropout is active at '{name}': call model.eval(), or set it to 0, to score")


def plain_linear(module: nn.Module) -> Linear:
    """A frozen layer that isn't recorded."""
    weight, bias, transposed = _plain(module, type(module).__name__)
    return Linear(module, weight, bias, (), None, transposed, recorded=False)


def _plain(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, bool]:
    """Weight as (out, in), bias, and whether the parameter is stored transposed."""
    if isinstance(module, nn.Linear):  # a subclass, as Falcon's, is verified like the rest
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if weight.is_floating_point() and weight.shape == (module.out_features, module.in_features):
            return weight, bias, False
    if type(module) is Conv1D:
        return module.weight.detach().T, module.bias.detach(), True
    raise ModelError(f"'{name}' is a {type(module).__name__}: gradients are served for nn.Linear and Conv1D")


@dataclass(frozen=True)
class Lora:
    """One plain LoRA layer: y = x·(W + scale·B·A)ᵀ + bias.

    Attributes:
        module: PEFT's layer; `get_base_layer()` holds W and the bias.
        adapter: the name of its one active adapter.
        down: A (r, in).
        up: B (out, r).
        scale: the factor on B·A, which rsLoRA forms otherwise than alpha / r.
    """

    module: Any
    adapter: str
    down: Tensor
    up: Tensor
    scale: float

    def merge(self, weight: Tensor) -> Tensor:
        """Return W + scale·B·A (out, in) in W's dtype, summed in float32.

        PEFT's `get_delta_weight` rounds scale·B·A before it is added: other bits, and in bfloat16 two roundings.
        """
        return torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.scale).to(weight.dtype)


def plain_loras(model: nn.Module) -> dict[str, Lora]:
    """Return the layers with an active LoRA by module name.

    Raises:
        ModelError: one of them, or something trained beside them, is more than plain LoRA; the message names it.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    loras: dict[str, Lora] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            raise ModelError(f"'{name}' is fully trained beside the LoRA (modules_to_save); score with LoRA alone")
        if not isinstance(module, LoraLayer):
            continue
        active = [a for a in module.active_adapters if a in module.lora_A or a in module.lora_embedding_A]
        if not active:
            continue
        if len(active) > 1:
            raise ModelError(f"'{name}' has {len(active)} active adapters ({', '.join(active)}); activate one")
        (adapter,) = active
        if adapter in module.lora_embedding_A:
            raise ModelError(f"'{name}': LoRA on an embedding has no per-example gradient here; target linear layers")
        if module.use_dora.get(adapter) or adapter in getattr(module, "lora_variant", {}):
            raise ModelError(f"'{name}' uses DoRA or another LoRA variant; gradients are served for plain LoRA")
        if module.merged:
            raise ModelError(f"'{name}' has its adapter merged; unmerge it before scoring")
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if b.bias is not None:
            raise ModelError(f"'{name}' trains a LoRA bias; gradients are served for lora_A and lora_B")
        loras[name] = Lora(module, adapter, a.weight.detach(), b.weight.detach(), float(module.scaling[adapter]))
    return loras


def _lora(model: nn.Module) -> dict[str, Linear]:
    linears: dict[str, Linear] = {}
    for name, lora in plain_loras(model).items():
        weight, bias, transposed = _plain(lora.module.get_base_layer(), name)
        names = (f"{name}.lora_A.{lora.adapter}.weight", f"{name}.lora_B.{lora.adapter}.weight")
        factors = (lora.down, lora.up, lora.scale)
        linears[name] = Linear(lora.module, lora.merge(weight), bias, names, factors, transposed)
    return linears


def _full(model: nn.Module, patterns: Sequence[str]) -> dict[str, Linear]:
    embedding = bare(model).get_input_embeddings().weight
    linears: dict[str, Linear] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        if not any(fnmatchcase(f"{name}.weight", p) or fnmatchcase(name, p) for p in patterns):
            continue
        if weight is embedding:
            raise ModelError(f"'{name}' shares its weight with the input embedding, which has no gradient here")
        dense, bias, transposed = _plain(module, name)
        linears[name] = Linear(module, dense, bias, (f"{name}.weight",), None, transposed)
    return linears
