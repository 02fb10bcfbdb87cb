"""Loading a causal LM, its tokenizer and an adapter: hub names, safetensors folders, GGUF files, the demonstration
models.

Weights are read from safetensors only: a pickle (`.bin`, `.pt`) can run any program when it is opened, so a folder that
has nothing else is refused. Code from a model's repository runs only with `trust_remote_code` and a pinned
`model_revision`.

Every model is checked against transformers' own forward pass before it is used (`keepset.model.check`): rows run
packed under keepset's attention where that gives the same numbers, else padded under the model's own, else not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keepset
from keepset.errors import ModelError
from keepset.model import weights
from keepset.model.encode import Encoder
from keepset.model.gguf import DEMO_MODELS, demo_folder, gguf_folder
from keepset.model.kind import check_config, fit_tokenizer
from keepset.model.weights import put_adapter, weight_files
from keepset.recipe import LoraSpec, ModelSpec
from keepset.runfolder.files import file_digest

log = logging.getLogger(__name__)

FUSED = {
    "q_proj": ("attn.c_attn", "qkv_proj", "query_key_value", "Wqkv", "q_b_proj", "query"),
    "k_proj": ("attn.c_attn", "qkv_proj", "query_key_value", "Wqkv", "kv_b_proj", "key"),
    "v_proj": ("attn.c_attn", "qkv_proj", "query_key_value", "Wqkv", "kv_b_proj", "value"),
    "o_proj": (
        *("attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense"),
        *("out_proj", "attention.output.dense"),
    ),
}
"""What a LoRA target is called where Llama's name does not exist (GPT-2, Phi, GPT-NeoX, MPT, DeepSeek, BERT)."""


_ENGINES: dict[tuple[Any, ...], Any] = {}
"""What the check of a model found in this process: the same weights are not checked twice."""

REMEDIES = {
    "does not recognize this architecture": "upgrade transformers, or check model_type in config.json",
    "trust_remote_code": "if you trust that code, set trust_remote_code: true and pin model_revision",
    "quantiz": "or name the checkpoint that is not quantised",
    "deserializing header": "a .safetensors file there is damaged, cut short or a Git LFS pointer: get it again",
    "backend tokenizer": "it has no tokenizer.json: get all of the tokenizer's files",
    "no file named model.safetensors": "get the whole model again",
    "No such file or directory": "model.safetensors.index.json names it: get the whole model again",
    "does not appear to have a file named model.safetensors": "weights are read from safetensors only",
    "does not appear to have a file named config.json": "an adapter is no model: name its base model",
}
"""What to do about what transformers and safetensors say."""

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""What configurations call the longest input (Llama, GPT-2, MPT, Whisper)."""


@dataclass
class Loaded:
    """A model ready to score.

    Attributes:
        model: PreTrainedModel or PeftModel, in eval mode.
        tokenizer: its fast tokenizer.
        encoder: messages -> tokens for it.
        spec: what was asked for.
        fingerprint: hash of weights, config, adapter and dtype.
    """

    model: Any
    tokenizer: Any
    encoder: Encoder
    spec: ModelSpec
    fingerprint: str


def resolve(spec: ModelSpec, *, config_only: bool = False) -> str:
    """Return the local folder (GGUF files and demonstration models are converted once) or the hub name.

    A folder needs no weights if it is asked for `config_only`.

    Raises:
        ModelError: nothing there, pickled weights only, an adapter instead of a model, remote code without a revision.
    """
    name = spec.model_name_or_path
    if spec.trust_remote_code and not spec.model_revision:
        raise ModelError("trust_remote_code runs code from the model's repository: pin it with model_revision")
    if name in DEMO_MODELS and not (Path(name) / "config.json").exists():  # any other folder may be called so
        return str(demo_folder(name))
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return str(gguf_folder(path))
    if path.is_dir():
        if not (config_only and (path / "config.json").is_file()):
            _check_folder(path)
        return str(path)
    if path.is_file():
        raise ModelError(f"{name}: a model is a folder with config.json and safetensors, or a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder")
    return name


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path}: an adapter, not a model; name its base model and give this as the adapter")
        raise ModelError(f"{path}: no config.json, so not a model folder")
    if not weight_files(path):
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path}: an adapter, not a model; name its base model and give this as the adapter")
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise ModelError(
                f"{path}: only pickled weights ({pickled[0]}), which can run any code when opened; save the model "
                "again with save_pretrained(..., safe_serialization=True)"
            )
        raise ModelError(f"{path}: no .safetensors weights")


def load_tokenizer(spec: ModelSpec, *, causal: bool = True, config_only: bool = False) -> Any:
    """Return the model's fast tokenizer; padding is on the right and pad falls back to eos.

    `causal`: it is to be run as a causal LM, rather than as a classifier. `config_only`: its weights need not be there.

    Raises:
        ModelError: it can't be found or read, doesn't fit the model, or the model is no causal LM.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = resolve(spec, config_only=config_only)
    options: dict[str, Any] = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    with one_line(source):
        config = AutoConfig.from_pretrained(source, **options)
        if causal:
            check_config(config, source)
    with one_line(f"{source}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.keepset_context = context_length(config)
    fit_tokenizer(tokenizer, config, source)
    return tokenizer


def adapter_tokenizer(folder: Path) -> Any | None:
    """The tokenizer that was saved beside an adapter, if one was.

    Raises:
        ModelError: it can't be read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    with one_line(str(folder)):
        return AutoTokenizer.from_pretrained(str(folder))


def context_length(config: Any) -> int | None:
    """Return the longest input a model has positions for, if its config says so."""
    text = config.get_text_config()
    lengths = [n for name in POSITIONS if type(n := getattr(text, name, None)) is int and n > 0]
    return min(lengths, default=None)


class one_line:
    """Turn what transformers and safetensors raise while loading into a ModelError of one line."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # safetensors raises its own SafetensorError, huggingface_hub its own HTTP errors: all are plain Exceptions
        # here.
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            text = f"transformers knows no {error}" if isinstance(error, KeyError) else str(error)
            lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
            remedy = next((f"; {words}" for cause, words in REMEDIES.items() if cause in text), "")
            raise ModelError(f"{self.source}: can't be loaded: {lines[0][:300].rstrip('.:')}{remedy}") from error


def pick_device(name: str) -> str:
    """Return `name`, or for `auto` cuda if there is one, else cpu.

    Raises:
        ModelError: cuda was asked for and there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {name}: torch sees no GPU here; use device: cpu")
    return name


def machine(spec: ModelSpec) -> dict[str, str]:
    """What numbers of a model depend on beside its weights: device, dtype, and the versions of the libraries."""
    from importlib.metadata import version

    import torch

    device = torch.device(pick_device(spec.device))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    libraries = {library: version(library) for library in ("numpy", "torch", "transformers")}
    return {"device": name, "dtype": spec.dtype, "keepset": keepset.__version__, **libraries}


def load(spec: ModelSpec, *, adapter: str | Path | None = None) -> Loaded:
    """Load a model, its tokenizer and, if given, a PEFT adapter (safetensors only); eval mode.

    Raises:
        ModelError: one line that says what is wrong and what to do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from keepset.model import attention
    from keepset.model.check import check

    source = resolve(spec)
    tokenizer = load_tokenizer(spec)
    device = pick_device(spec.device)
    options: dict[str, Any] = {
        "revision": spec.model_revision,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": getattr(torch, spec.dtype),
        "use_safetensors": True,
    }
    attn = spec.attn_implementation
    with one_line(source):
        model: Any = weights.read(AutoModelForCausalLM, source, attn_implementation=attn, **options)
    model = model.to(device).eval()
    fingerprint = [weights.fingerprint(source, spec.model_revision, code=spec.trust_remote_code), spec.dtype]
    checked = (*fingerprint, device, attn)
    if attn is None and model._can_set_attn_implementation():
        model.set_attn_implementation(attention.NAME)
    known = _ENGINES.get(checked)
    engine = _ENGINES[checked] = check(model, known)
    if known is None and engine.apart == 0:
        log.warning("%s: rows run one at a time, since others in a batch would change their numbers", source)
    elif known is None and not engine.packed and attn is None:
        log.warning(
            "%s (%s) can't be run packed: padded batches instead, the same numbers more slowly",
            spec.model_name_or_path,
            model.config.model_type,
        )
    if adapter is not None:
        model = load_adapter(model, adapter)
        fingerprint.append(file_digest(Path(adapter) / "adapter_model.safetensors"))
        fingerprint.append(file_digest(Path(adapter) / "adapter_config.json"))
    digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
    return Loaded(model, tokenizer, Encoder(tokenizer, spec), spec, digest)


def load_adapter(model: Any, adapter: str | Path, *, trainable: bool = False) -> Any:
    """Put a PEFT adapter on a model and return the PeftModel in eval mode; safetensors only.

    With `trainable` the adapter's matrices take gradients.

    Raises:
        ModelError: no adapter there, a pickled one, or one made for another model.
    """
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{adapter}: no adapter_config.json, so not an adapter folder")
    if not (folder / "adapter_model.safetensors").is_file():
        what = "pickled weights" if (folder / "adapter_model.bin").exists() else "no weights"
        raise ModelError(f"{adapter}: {what}; an adapter needs adapter_model.safetensors")
    with one_line(str(adapter)):
        return put_adapter(model, folder, trainable=trainable).eval()


def linear_names(model: Any) -> list[str]:
    """Return the full names of the linear modules (Conv1D of GPT-2 included), the output head left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def lora_targets(names: list[str], targets: list[str]) -> list[str]:
    """Map LoRA targets to the modules a model has; fused projections stand in for q, k, v and o.

    Raises:
        ModelError: a target the model does not have, with those it has.
    """

    def there(target: str) -> bool:
        return any(n == target or n.endswith(f".{target}") for n in names)

    chosen: list[str] = []
    for target in targets:
        name = target if there(target) else next((c for c in FUSED.get(target, ()) if there(c)), None)
        if name is None:
            kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))
            raise ModelError(f"lora_target_modules: the model has no '{target}'; its linear modules are: {kinds}")
        if name not in chosen:
            chosen.append(name)
    if chosen != targets:
        log.warning("LoRA targets %s are called %s in this model", ", ".join(targets), ", ".join(chosen))
    return chosen


def lora_config(lora: LoraSpec, model: Any) -> Any:
    """Build PEFT's LoraConfig for a model.

    Raises:
        ModelError: the model has none of the target modules; the message names those it has.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    asked = lora.lora_target_modules
    targets: Any = asked if isinstance(asked, str) else lora_targets(linear_names(model), list(asked))
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT divides by r: a float works
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
    )


def apply_lora(model: Any, lora: LoraSpec, seed: int) -> Any:
    """Wrap a model in a fresh LoRA (B = 0, so the numbers are unchanged) and return the PeftModel.

    The seed decides A; the global random state is left as it was.

    Raises:
        ModelError: a target module the model does not have.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(lora, model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)
