"""Reading weights whole or not at all.

transformers draws a tensor at random where a checkpoint lacks it, or holds it in another shape, and passes over one
that the model has no place for; PEFT only warns. Here each of them is an error with the tensors' names. What an
architecture itself says may be absent or left over (tied heads, rotary tables, position ids) is no fault:
transformers takes those out of its report before it is read here.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepset.errors import ModelError, first_line
from keepset.runfolder.files import digest, file_digest

log = logging.getLogger(__name__)

CONSTANTS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids|_extra_state)$"
)
"""Left-over tensors that hold no weights: rotary tables and causal masks, which older versions saved."""

HEAD = "; where the head is the embedding, set tie_word_embeddings: true in config.json"

RUNS_OTHERWISE = ("PeftType.XLORA", "PeftType.POLY")
"""Adapters that look at a row as a whole, or at its task."""

NOT_NUMBERS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "_name_or_path",
               "transformers_version")  # fmt: skip
"""What a config says that changes no number."""

NO_ADAPTER = {"subfolder": "no-adapter"}
"""`adapter_kwargs` under which transformers finds no adapter_config.json beside a model's weights."""


def read(
    auto: Any, source: str, *, drawn: str = r"(?!)", spare: Callable[[Any, str], bool] | None = None, **options: Any
) -> Any:
    """Return `auto.from_pretrained(source)`, all its weights from the checkpoint; an adapter beside it is not put on.

    What matches `drawn` the checkpoint may lack: a new head that is still to be trained. `spare` tells, of the model
    and a tensor that it has no place for, whether that is the head of another task.

    Raises:
        ModelError: a tensor is missing, has another shape or is left over.
        Exception: whatever transformers raises.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(source, revision=options.get("revision")):
        log.warning(
            "%s: the adapter beside the model's own weights (adapter_config.json) is not put on; transformers and "
            "trainers would put it on: move it away",
            source,
        )
    with quiet_report() as report:
        try:
            model, info = auto.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, adapter_kwargs=NO_ADAPTER, **options
            )
        except RuntimeError as error:
            if not report:
                raise
            raise ModelError(
                f"{source}: what the model keeps as one tensor can't be put together from the checkpoint's parts: "
                f"{tensors(report)}; some are missing or of another shape: get the checkpoint again"
            ) from error
    shapes = {name: f"{name}: {tuple(has)} for {tuple(wants)}" for name, has, wants in info["mismatched_keys"]}
    missing = [k for k in info["missing_keys"] if k not in shapes and not re.search(drawn, k)]
    left = [k for k in info["unexpected_keys"] if not CONSTANTS.search(k) and not (spare and spare(model, k))]
    faults = faults_of(missing, shapes.values(), left, type(model).__name__)
    if faults:
        raise ModelError(
            f"{source}: {faults}; the checkpoint is incomplete or config.json is another model's: get both again"
            + (HEAD if set(missing) == {"lm_head.weight"} and not left else "")
        )
    settle_dtype(model, options.get("dtype"), source)
    return model


def put_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Return the PeftModel of `model` with the adapter in `folder`, every tensor of the adapter from its file.

    Raises:
        ModelError: a tensor is missing, has another shape, fits no module, or would replace one of the base's own; an
            adapter that does more than change weights.
        Exception: whatever PEFT raises.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.is_adaption_prompt or str(config.peft_type) in RUNS_OTHERWISE or (
        getattr(config, "alora_invocation_tokens", None)
    ):  # fmt: skip
        raise ModelError(f"{folder}: {config.peft_type} does more than change weights, which packed rows can't follow")
    check_base_tensors(model, folder, list(getattr(config, "modules_to_save", None) or ()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below, with what to do
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    except RuntimeError as error:  # of load_state_dict: one line a tensor
        shapes = re.findall(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", str(error))
        if not shapes:
            raise
        faults = faults_of([], [f"{name}: ({has}) for ({wants})" for name, has, wants in shapes], [], "the model")
        raise ModelError(f"{folder}: {faults}; the adapter was made for another model or rank") from error
    except KeyError as error:  # a module that the config says was trained whole
        raise ModelError(f"{folder}: the adapter lacks {error.args[0]}, which its config names") from error
    # PEFT only warns of what is missing and says nothing of what is left over: it is read once more for its report.
    result = adapted.load_adapter(str(folder), adapted.active_adapter, is_trainable=trainable)
    faults = faults_of(result.missing_keys, [], result.unexpected_keys, "the model")
    if faults:
        adapted.unload()
        raise ModelError(f"{folder}: {faults}; the adapter is incomplete or was made for another model")
    return adapted


def check_base_tensors(model: Any, folder: Path, whole: list[str]) -> None:
    """Refuse an adapter file with tensors of the base itself: PEFT would write them over the base's, for good.

    `whole` are modules that the adapter brings whole (`modules_to_save`), of which PEFT keeps a copy.

    Raises:
        ModelError: one of them differs from the base's.
    """
    import torch
    from safetensors import safe_open

    own = model.state_dict()
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            module = name.rpartition(".")[0]
            if name not in own or any(module.endswith(one) for one in whole):
                continue
            tensor = file.get_tensor(key)
            if tensor.shape != own[name].shape or not torch.equal(tensor.to(own[name]), own[name]):
                raise ModelError(
                    f"{folder}: the adapter holds another {name} {tuple(tensor.shape)} than the base "
                    f"{tuple(own[name].shape)}, which would be written over; save both merged, as one model"
                )


def settle_dtype(model: Any, dtype: Any, source: str) -> None:
    """Give what a quantiser dequantised one dtype: it leaves what was not packed in the checkpoint's own.

    Raises:
        ModelError: a tensor is still packed, because its scale is missing.
    """
    other = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != dtype}
    if dtype is None or not other or getattr(model.config, "quantization_config", None) is not None:
        return
    packed = [name for name, p in other.items() if p.element_size() == 1]
    if packed:
        raise ModelError(
            f"{source}: {tensors(packed)} of 8 bits without a scale, or of a quantisation that config.json does not "
            "name: get the whole checkpoint again"
        )
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    if dtype.itemsize == 4 or not kept:
        model.to(dtype)


def faults_of(missing: Iterable[str], shapes: Iterable[str], left: Iterable[str], name: str) -> str:
    """What is wrong with a folder's tensors, in one line; empty if nothing is."""
    parts = []
    for what, faulty in (
        (f"lacks {{}} of {name}", missing),
        (f"holds {{}} in another shape than {name}", shapes),
        (f"holds {{}} that {name} has no place for", left),
    ):
        names = sorted(faulty, key=natural)
        if names:
            parts.append(what.format(tensors(names)))
    return " and ".join(parts)


def tensors(names: Sequence[str]) -> str:
    """Their number and the first three."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def natural(name: str) -> list[Any]:
    """Sort key under which layer 2 stands before layer 10."""
    return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]


@contextmanager
def quiet_report() -> Iterator[list[str]]:
    """Keep transformers' table of tensors off the screen; the list gets the names of those it could not convert."""
    conversions: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    shown = logger.getEffectiveLevel()

    def keep(record: logging.LogRecord) -> bool:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()).splitlines() or [""]
        if "LOAD REPORT" not in lines[0]:
            return record.levelno >= shown
        rows = [line.split("|") for line in lines]
        conversions.extend(row[0].strip() for row in rows if len(row) > 1 and row[1].strip() == "CONVERSION")
        return False

    level = logger.level
    if shown > logging.WARNING:  # a level of its own of WARNING makes transformers report on tensor parallelism
        logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    try:
        yield conversions
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def fingerprint(source: str, revision: str | None = None, *, code: bool = False) -> str:
    """What a folder's weights, or a hub model's, are: file hashes, or the name and the commit.

    `code`: the folder's own Python is run, and counts too.

    Raises:
        ModelError: the hub model's commit can't be told.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file, extract_commit_hash

        try:
            file = cached_file(source, "config.json", revision=revision)
        except OSError as error:
            raise ModelError(f"{source}: {first_line(error, 300)}") from None
        commit = extract_commit_hash(file, None)
        if commit is None:
            raise ModelError(f"{source}: its commit can't be told; download it and give the folder")
        return f"{source}@{commit}"
    files = [folder / "config.json", *weight_files(folder), *(sorted(folder.glob("*.py")) if code else ())]
    return json.dumps([[p.name, _digest(p.resolve(), p.stat().st_size, p.stat().st_mtime_ns)] for p in files])


@lru_cache(maxsize=1024)
def _digest(path: Path, size: int, changed: int) -> str:
    """A file's sha256, read once a process while size and time stay: a run asks for its base at every training."""
    return file_digest(path)


def weight_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files, by name; an adapter's beside them is not the model's."""
    return sorted(p for p in folder.glob("*.safetensors") if p.name != "adapter_model.safetensors")


def config_digests(folder: Path) -> list[str]:
    """Checksums of a folder's adapter_config.json and config.json, wherever its base lies and whoever wrote them."""
    digests = []
    for file in (folder / "adapter_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        try:
            config = {k: v for k, v in json.loads(file.read_bytes()).items() if k not in NOT_NUMBERS}
        except (ValueError, AttributeError):  # no JSON object: refused in words when it is loaded
            config = {"file": file_digest(file)}
        if file.name == "adapter_config.json":  # PEFT writes sets as lists, in any order
            config = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items()}
        digests.append(digest(config))
    return digests
