"""`trainers/` in a run folder: the chosen rows and ready configs for TRL, axolotl and LLaMA-Factory.

Each config says what the recipe's `train` and `lora` sections say, in that trainer's own words, and reads the rows from
beside itself. The commands are run in the run folder, which may be moved; a model that is a folder here is named by its
absolute path, and so is a file that `extra` names. Which tokens are supervised is the recipe's `model.supervise`:

* TRL: rows with one answer (or `supervise: last`) are written as prompt and completion, whose loss TRL takes over the
  completion alone; rows with several answers as `messages` with `assistant_only_loss`, which needs a template that TRL
  knows how to mark.
* axolotl: `roles_to_train: [assistant]`, each with its end of turn; with `supervise: last` every message of
  `rows.jsonl` says by `train` whether it counts.
* LLaMA-Factory: `mask_history` for the last turn alone. It takes the tokenizer's template, not a file.

Sources: the argument classes of trl 1.16, axolotl 0.19 (`AxolotlInputConfig`) and llamafactory 0.9.5 (its five
dataclasses); a test holds the keys against copies of their names.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from keepset.data.export_dialects import DIALECTS
from keepset.data.turns import is_learnt
from keepset.located import SETTINGS_FILES
from keepset.model.gguf import DEMO_MODELS
from keepset.runfolder import layout
from keepset.runfolder.files import write_atomic

if TYPE_CHECKING:
    from keepset.pipeline.choose import Subset
    from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
    from keepset.stages.job import Job

FOLDER = layout.TRAINERS_FOLDER
ANSWER = "assistant"

README = """# {n} rows chosen by {label}, ready for a trainer

Run these in the run folder, the one above this: `cd {folder}`. They repeat the recipe's `train` and `lora` sections;
nothing is sent anywhere.

| trainer | command |
|---|---|
| TRL | `trl sft --config trainers/trl_sft.yaml` |
| axolotl | `axolotl train trainers/axolotl.yaml` |
| LLaMA-Factory | `llamafactory-cli train trainers/llamafactory.yaml` |

`rows.jsonl`: the rows as {kind}. `trl.jsonl`: the same rows in the form whose loss TRL takes over the answers alone.
{notes}"""


def write_trainers(job: Job, subset: Subset) -> list[str]:
    """Write `trainers/` for the rows of one subset.

    The recipe's `train_model` (else `model`), `lora` and `train` are carried over. Returns the names of the files
    written, in the run folder; none if the recipe trains on pairs, or if the subset mixes plain text with chats, which
    no trainer takes in one file (said on screen).
    """
    if job.recipe.train.loss != "sft":
        job.say(f"{FOLDER}/: not written, the configs are for SFT and this recipe trains by {job.recipe.train.loss}")
        return []
    rows = [job.pool.messages(i) for i in job.usable[subset.indices]]
    plain = [row[0]["role"] == "text" for row in rows]
    if any(plain) and not all(plain):
        job.say(f"{FOLDER}/: not written, the subset mixes plain text with chats; export each by itself")
        return []
    spec = job.recipe.train_model or job.recipe.model
    if any("train" in m for row in rows for m in row):
        if any(is_learnt(m) != (k == len(row) - 1) for row in rows for k, m in enumerate(row) if m["role"] == ANSWER):
            job.say(
                f"{FOLDER}/: not written, rows mark answers as not trained on, which TRL and LLaMA-Factory can't do"
            )
            return []
        spec = spec.model_copy(update={"supervise": "last"})  # what the rows' own marks say
    model = _Model(spec, None if job.text_only else template_of(job, spec))
    single = all(sum(m["role"] == ANSWER for m in row) == 1 for row in rows)
    kind = "text" if all(plain) else "prompt-completion" if single or spec.supervise == "last" else "messages"
    marked = [[{**m, "train": k == len(row) - 1} for k, m in enumerate(row)] for row in rows]
    args, lora, seed = job.recipe.train, job.recipe.lora, job.recipe.train_seeds[0]
    files = {
        "rows.jsonl": lines(marked if spec.supervise == "last" else rows, "text" if all(plain) else "messages"),
        "trl.jsonl": lines(rows, kind),
        "trl_sft.yaml": config(trl(model, args, lora, seed, kind)),
        "axolotl.yaml": config(axolotl(model, args, lora, seed, text=all(plain))),
        "llamafactory.yaml": config(llamafactory(model, args, lora, seed, n_rows=len(rows), text=all(plain))),
        "dataset_info.json": json.dumps(dataset_info(text=all(plain)), indent=1) + "\n",
    }
    if model.template is not None:
        files["chat_template.jinja"] = model.template
    files[layout.CARD] = README.format(
        n=subset.n_rows,
        label=subset.label,
        kind="plain `text`" if all(plain) else "`messages`",
        notes=notes(model, args, kind),
        folder=shlex.quote(str(job.run.path.resolve())),
    )
    for name, text in files.items():
        write_atomic(job.run.path / FOLDER / name, text.encode("utf-8", "surrogatepass"))
    return [f"{FOLDER}/{name}" for name in files]


class _Model:
    """What the configs say about the model: where it is, and its template where it isn't the tokenizer's own."""

    def __init__(self, spec: ModelSpec, template: str | None) -> None:
        self.spec, self.template = spec, template
        self.path = spec.model_name_or_path
        if self.path in DEMO_MODELS or self.path.lower().endswith(".gguf"):
            from keepset.model.load import resolve

            self.path = resolve(spec)  # other tools know neither name: the converted folder
        self.path = absolute(self.path)


def absolute(path: Any) -> Any:
    """The absolute path of a file or folder that is there; anything else, hub names too, as it is."""
    there = isinstance(path, str) and Path(path).expanduser().exists()
    return str(Path(path).expanduser().absolute()) if there else path


def template_of(job: Job, spec: ModelSpec) -> str | None:
    """The chat template to hand over: None where it is the tokenizer's own.

    The plain-text template gets a generation prompt, without which a trainer can't tell the prompt's end, and the
    tokenizer's own name of the BOS token.
    """
    from keepset.model.encode import PLAIN_TEMPLATE, Encoder
    from keepset.model.load import load_tokenizer

    tokenizer = job.encoder.tokenizer if job.recipe.train_model is None else load_tokenizer(spec)
    if spec.chat_template is None and tokenizer.chat_template:
        return None
    encoder = job.encoder if job.recipe.train_model is None else Encoder(tokenizer, spec)
    if encoder.template != PLAIN_TEMPLATE:
        return encoder.template
    start = "{{ bos_token }}" if encoder.adds_bos else ""
    ending = "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
    return PLAIN_TEMPLATE.replace("{{ start }}", start) + ending


def lines(rows: list[Any], kind: str) -> str:
    """The rows as JSON lines of a dialect, or as `text`."""
    write = (lambda row: {"text": row[0]["content"]}) if kind == "text" else DIALECTS[kind]
    return "".join(json.dumps(write(row), ensure_ascii=False) + "\n" for row in rows)


def config(settings: dict[str, Any]) -> str:
    """YAML in the order given, keys without a value left out."""
    return yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False, allow_unicode=True)


def notes(model: _Model, args: TrainSpec, kind: str) -> str:
    """What a config can't say, as a paragraph."""
    lines = []
    if model.template is not None:
        lines.append(
            "`chat_template.jinja` is the template the rows were scored with; LLaMA-Factory takes the tokenizer's own "
            "instead (or one of its names under `template`)."
        )
    if kind == "messages":
        lines.append("Rows have several answers: TRL needs a template it can mark (`assistant_only_loss`).")
    if args.extra:
        lines.append(f"The recipe's `extra` ({', '.join(args.extra)}) is in the TRL config alone.")
    return "".join(f"\n* {text}" for text in lines) + ("\n" if lines else "")


def trl(model: _Model, args: TrainSpec, lora: LoraSpec, seed: int, kind: str) -> dict[str, Any]:
    """`trl sft --config`: ScriptArguments, SFTConfig, ModelConfig and DatasetMixtureConfig in one file."""
    targets = lora.lora_target_modules
    adapter = {
        "use_peft": True, "lora_r": lora.lora_r, "lora_alpha": whole(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout, "lora_target_modules": [targets] if isinstance(targets, str) else targets,
    }  # fmt: skip
    return {
        "model_name_or_path": model.path,
        "model_revision": model.spec.model_revision,
        "trust_remote_code": model.spec.trust_remote_code or None,
        "dtype": model.spec.dtype,
        "attn_implementation": model.spec.attn_implementation,
        "chat_template_path": None if model.template is None else f"{FOLDER}/chat_template.jinja",
        "datasets": [{"path": "json", "data_files": [f"{FOLDER}/trl.jsonl"], "split": "train"}],
        "assistant_only_loss": True if kind == "messages" else None,
        "max_length": model.spec.max_length,
        **({} if args.full else adapter),
        **common(args),
        "warmup_steps": args.warmup_ratio,  # below 1: a share of the steps
        "lr_scheduler_type": args.lr_scheduler_type,
        "bf16": model.spec.dtype == "bfloat16",
        "fp16": model.spec.dtype == "float16",
        "gradient_checkpointing": False,
        "use_cpu": True if model.spec.device == "cpu" else None,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "report_to": "none",
        "seed": seed,
        "output_dir": f"{FOLDER}/out-trl",
        **{k: absolute(v) if k in SETTINGS_FILES else v for k, v in args.extra.items()},
    }


def axolotl(model: _Model, args: TrainSpec, lora: LoraSpec, seed: int, *, text: bool) -> dict[str, Any]:
    """`axolotl train`: AxolotlInputConfig."""
    last = model.spec.supervise == "last"
    chat: dict[str, Any] = {
        "type": "chat_template", "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        **({"roles_to_train": [], "message_field_training": "train"} if last else {"roles_to_train": [ANSWER]}),
        "train_on_eos": "turn",
    }  # fmt: skip
    targets = lora.lora_target_modules
    adapter = {
        "adapter": "lora", "lora_r": lora.lora_r, "lora_alpha": whole(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        **({"lora_target_linear": True} if isinstance(targets, str) else {"lora_target_modules": targets}),
    }  # fmt: skip
    source = {"type": "completion", "field": "text"} if text else chat
    own = {"chat_template": "jinja", "chat_template_jinja": f"{FOLDER}/chat_template.jinja"}
    return {
        "base_model": model.path,
        "revision_of_model": model.spec.model_revision,
        "trust_remote_code": model.spec.trust_remote_code or None,
        "attn_implementation": model.spec.attn_implementation,
        "datasets": [{"path": f"{FOLDER}/rows.jsonl", "ds_type": "json", **source}],
        **({} if text else own if model.template is not None else {"chat_template": "tokenizer_default"}),
        "train_on_inputs": False,
        "sequence_len": model.spec.max_length,
        "sample_packing": False,
        **({} if args.full else adapter),
        "num_epochs": args.num_train_epochs,
        "micro_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler": args.lr_scheduler_type,
        "warmup_ratio": args.warmup_ratio,
        "optimizer": "adamw_torch",
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "bf16": model.spec.dtype == "bfloat16",
        "fp16": model.spec.dtype == "float16",
        "gradient_checkpointing": False,
        "val_set_size": 0.0,
        "logging_steps": 1,
        "saves_per_epoch": 1,
        "seed": seed,
        "output_dir": f"{FOLDER}/out-axolotl",
    }


def llamafactory(
    model: _Model, args: TrainSpec, lora: LoraSpec, seed: int, *, n_rows: int, text: bool
) -> dict[str, Any]:
    """`llamafactory-cli train`: Model-, Data-, Training-, Finetuning- and GeneratingArguments in one file.

    It runs on several versions of transformers, some of which know the warm-up only as a share, some only as steps;
    whole steps are understood by all.
    """
    batches = math.ceil(n_rows / args.per_device_train_batch_size)
    steps = math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
    targets = lora.lora_target_modules
    adapter = {
        "finetuning_type": "lora", "lora_rank": lora.lora_r, "lora_alpha": round(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout, "lora_target": "all" if isinstance(targets, str) else ",".join(targets),
    }  # fmt: skip
    return {
        "model_name_or_path": model.path,
        "model_revision": model.spec.model_revision,
        "trust_remote_code": model.spec.trust_remote_code or None,
        "stage": "pt" if text else "sft",
        "do_train": True,
        "dataset": "keepset",
        "dataset_dir": FOLDER,
        "cutoff_len": model.spec.max_length,
        "mask_history": True if model.spec.supervise == "last" else None,
        **({"finetuning_type": "full"} if args.full else adapter),
        **common(args),
        "warmup_steps": math.ceil(steps * args.warmup_ratio),
        "lr_scheduler_type": args.lr_scheduler_type,
        "bf16": model.spec.dtype == "bfloat16",
        "fp16": model.spec.dtype == "float16",
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "report_to": "none",
        "seed": seed,
        "output_dir": f"{FOLDER}/out-llamafactory",
    }


def dataset_info(*, text: bool) -> dict[str, Any]:
    """LLaMA-Factory's entry for `rows.jsonl`; `openai` formatting would add a system line of its own."""
    if text:
        return {"keepset": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": ANSWER,
            "system_tag": "system", "observation_tag": "tool"}  # fmt: skip
    entry = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    return {"keepset": entry}


def common(args: TrainSpec) -> dict[str, Any]:
    """What TRL and LLaMA-Factory call by the same names."""
    names = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
             "weight_decay", "max_grad_norm")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def whole(value: float) -> float | int:
    """A whole number as int, as these tools' schemas want `lora_alpha`."""
    return int(value) if value == int(value) else value
