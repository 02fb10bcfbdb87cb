"""A model's shape without its weights: what counting operations and bytes needs, from `config.json` alone."""

from __future__ import annotations

from typing import Any

from keepset.model.encode import Encoder
from keepset.model.load import Loaded, linear_names, load_tokenizer, lora_targets, one_line, resolve
from keepset.recipe import LoraSpec, ModelSpec
from keepset.runfolder.files import digest


def outline(spec: ModelSpec) -> Loaded:
    """A model on torch's `meta` device: every tensor has its shape and none has memory. It can't be run.

    Its folder needs `config.json` and the tokenizer; weights are not looked at, so its fingerprint is the config's.

    Raises:
        ModelError: the config or tokenizer can't be read, or it is no causal LM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(spec, config_only=True)
    source = resolve(spec, config_only=True)
    code = {"trust_remote_code": spec.trust_remote_code}
    with one_line(source):
        config = AutoConfig.from_pretrained(source, revision=spec.model_revision, **code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype), **code)
    return Loaded(model.eval(), tokenizer, Encoder(tokenizer, spec), spec, digest(["outline", config.to_json_string()]))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def adapter_numbers(model: Any, lora: LoraSpec) -> int:
    """Numbers of a LoRA on a model: r · (in + out) for each of its matrices.

    Raises:
        ModelError: the model has none of the target modules.
    """
    names, asked = linear_names(model), lora.lora_target_modules
    if isinstance(asked, str):
        adapted = names
    else:
        targets = lora_targets(names, list(asked))
        adapted = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
    return sum(lora.lora_r * sum(model.get_submodule(name).weight.shape) for name in adapted)
