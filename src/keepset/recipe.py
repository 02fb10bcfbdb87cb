"""The YAML of `keepset run`: one pydantic model, every field documented, unknown keys refused with a did-you-mean.

Names are TRL's and Hugging Face's wherever they have one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from keepset.budget_text import parse_budget
from keepset.errors import RecipeError, did_you_mean
from keepset.executor_spec import ExecutorSpec
from keepset.idle import idle, refuse_idle
from keepset.keys import set_key, without_gone
from keepset.located import located
from keepset.recipe_select import SelectSpec
from keepset.recipe_truth import ControlSpec, Strict, ValidateSpec


class ModelSpec(Strict):
    """Which causal LM, and how rows become tokens for it."""

    model_name_or_path: str = Field(
        "demo", description="hub name, local folder, .gguf file, or `demo` (SmolLM2-135M-Instruct)"
    )
    model_revision: str | None = Field(None, description="commit or tag of a hub model; needed for trust_remote_code")
    trust_remote_code: bool = Field(False, description="run code from the model's repository; only with model_revision")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    attn_implementation: str | None = Field(None, description="Hugging Face's name; default: the packed fast path")
    chat_template: str | None = Field(
        None, description="a Jinja file, or `plain`; default: the tokenizer's own, else the plain-text one"
    )
    supervise: Literal["all", "last"] = Field("all", description="which assistant turns are supervised")
    max_length: int = Field(1024, ge=8, description="longest row in tokens, template included")
    overlong: Literal["quarantine", "truncate"] = Field(
        "quarantine", description="a longer row is quarantined, or cut at its end and flagged `truncated`"
    )


class LoraSpec(Strict):
    """The adapter; TRL's ModelConfig names."""

    lora_r: int = Field(8, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: list[str] | Literal["all-linear"] = Field(["q_proj", "k_proj", "v_proj", "o_proj"])


class DataSpec(Strict):
    """One file, folder or hub dataset."""

    path: str = Field(description="file (.jsonl .json .csv .parquet, also .gz .zst), folder, hub name, or `-`")
    name: str | None = Field(None, description="the `source` (pools) or default `task` (targets); default: file stem")
    format: str | None = Field(None, description="dialect; default: detected from the columns")
    split: str = Field("train", description="split of a hub dataset or saved DatasetDict")
    limit: int | None = Field(None, ge=1, description="first N rows only, said on screen: for trying things out")
    shots: int | None = Field(None, ge=1, description="targets: N pairs a task, drawn with the recipe's seed (nested)")
    length_matched: bool = Field(False, description="targets: keep pairs whose sides differ by at most 20 % in length")
    task_column: str = Field("task", description="targets: the column that names the task")
    pairs: bool = Field(False, description="pools: keep the rejected side too, to select rows for preference training")
    category_column: str | None = Field(None, description="pools: a column kept as `category` for quotas and reports")


class MixPart(Strict):
    """One pool's share of a mix."""

    source: str = Field(description="the `name` of a pool")
    method: str = Field("full", description="the label of a method that ranks this pool's rows, or `full`")
    budget: int | str = Field("100%", description="rows, percentage of this pool, or tokens")


def check_label(label: str) -> str:
    """Refuse a label that can't be a file name everywhere.

    Raises:
        RecipeError: as said.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", label):
        raise RecipeError(f"label {label[:80]!r}: letters, digits and . _ + - only, at most 64")
    return label


class MixSpec(Strict):
    """A training set put together from several pools, each with its own method and budget (DavIR's Alpaca + GSM8K)."""

    label: str
    parts: list[MixPart] = Field(min_length=1, description="what each pool gives")

    @field_validator("label")
    @classmethod
    def _label(cls, value: str) -> str:
        return check_label(value)


class VariantSpec(Strict):
    """The same scoring with some keys changed: another model, seed, reference ..."""

    label: str = Field(description="its name, and its folder's under `variants/`")
    set: dict[str, Any] = Field(min_length=1, description="recipe keys by dotted name: `reference.num_train_epochs: 3`")

    @field_validator("label")
    @classmethod
    def _label(cls, value: str) -> str:
        return check_label(value)


class TrainSpec(Strict):
    """Trainer arguments; whatever TRL's SFTConfig or DPOConfig takes may be added under `extra`."""

    num_train_epochs: float = 3
    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_processes: int = Field(1, ge=1, description="of this machine that share each batch; started by `keepset run`")
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    full: bool = Field(False, description="full fine-tuning instead of LoRA")
    loss: Literal["sft", "dpo", "ipo", "dpo_mean", "davir", "simpo"] = Field(
        "sft", description="all but sft train on pairs: a pool with `pairs: true`"
    )
    beta: float | None = Field(None, gt=0, description="β of a pair loss; default: see `keepset train dpo`")
    extra: dict[str, Any] = Field(default_factory=dict, description="further SFTConfig / DPOConfig arguments")

    def key(self) -> dict[str, Any]:
        """What a training's result depends on, for fingerprints; the loss is left out where it is the plain one."""
        left_out = {
            "checkpoints",
            *(("num_processes",) if self.num_processes == 1 else ()),
            *({"loss", "beta"} if self.loss == "sft" else ()),
        }
        return self.model_dump(mode="json", exclude=left_out)

    @field_validator("extra")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse tokens before the recipe is written anywhere."""
        for key in ("hub_token", "push_to_hub_token"):
            if key in value:
                raise ValueError(f"extra.{key}: recipes are stored and shared; set HF_TOKEN in the environment instead")
        return value


class WarmupSpec(TrainSpec):
    """ROSE/LESS warm-up (rose.md section 3): 5 % of the pool, 4 epochs, a checkpoint an epoch, lr 2e-5."""

    fraction: float = Field(0.05, gt=0, le=1, description="share of the pool, drawn with `seed`")
    min_rows: int = Field(8, ge=1, description="at least this many rows")
    num_train_epochs: float = 4
    learning_rate: float = 2e-5
    checkpoints: Literal["all", "last"] = Field("all", description="which epochs' ends are scored at; last is cheaper")
    seed: int | None = Field(None, description="picks the subset and the order; default: the recipe's seed")
    path: str | None = Field(None, description="an existing warm-up: `models/warmup` of another run")


class ReferenceSpec(TrainSpec):
    """DavIR's reference model: the base fine-tuned on the pool or on a share of it, or an existing model."""

    fraction: float = Field(1, gt=0, le=1, description="share of the pool that it is trained on, drawn with `seed`")
    path: str | None = Field(None, description="an existing reference: adapter folder, model folder or hub name")
    folds: int = Field(0, ge=0, description="K >= 2: cross-fitted, each row scored by a model not trained on it")

    def key(self) -> dict[str, Any]:
        """As of every training; the share is left out where it is the whole."""
        key = super().key()
        return key if self.fraction < 1 else {name: value for name, value in key.items() if name != "fraction"}


class GradientSpec(Strict):
    """How gradient methods form their scores: exactly, unless one of these trades accuracy for cost."""

    store: str | None = Field(
        None, description="folder of a reusable store: rows are sketched once, later targets only read it"
    )
    store_dim: int | None = Field(None, ge=1, description="numbers a row; default: from store_error")
    store_error: float = Field(0.01, gt=0, lt=1, description="standard deviation of a cosine near 0; sets store_dim")
    store_dtype: Literal["float16", "int8"] = Field("float16", description="numbers of the store; each row has a scale")
    store_sample: int = Field(64, ge=0, description="rows also scored exactly, to measure the store's error")
    last_layers: int | None = Field(None, ge=1, description="matrices of the top so many layers only")
    max_completion_tokens: int | None = Field(None, ge=1, description="score each row by its first so many tokens")


class MethodSpec(Strict):
    """One method: its name, a label to tell variants apart, and its own options."""

    name: str
    label: str = ""
    shots: int | None = Field(None, ge=1, description="aim at the first N rows a task of the target (nested draws)")
    options: dict[str, Any] = Field(default_factory=dict, description="see `keepset methods NAME`")

    @model_validator(mode="after")
    def _label(self) -> MethodSpec:
        if not self.label:
            self.label = self.name
        check_label(self.label)
        return self

    def key(self) -> dict[str, Any]:
        """What its scores depend on, for fingerprints."""
        return self.model_dump(mode="json", exclude={"shots"} if self.shots is None else None)


class EvaluateSpec(Strict):
    """What is measured on every trained model."""

    pairs: list[DataSpec] = Field(default_factory=list, description="held-out chosen/rejected pairs")
    heldout: list[DataSpec] = Field(default_factory=list, description="held-out SFT rows: loss")
    gsm8k: DataSpec | None = Field(None, description="question/answer rows: exact match by generation, and loss")
    gsm8k_limit: int = Field(50, ge=1)
    max_new_tokens: int = 256
    length_match: float = Field(0.2, description="a pair is length-matched if its sides differ by at most this share")
    bootstrap: int = Field(2000, ge=100, description="resamples of each 95 % interval")
    headline: str | None = Field(
        None, description="the measure that is looked at first: a name in comparison.json; default: see docs/recipes.md"
    )
    each_epoch: bool = Field(False, description="also at every epoch's end: validation loss against performance")


class BatchSpec(Strict):
    """What runs together when scoring."""

    token_budget: int = Field(1024, ge=16, description="tokens a packed batch holds")
    shard_rows: int | None = Field(
        None, ge=1, description="rows a shard, the unit of resume; default n / 200, 32 to 2,048"
    )
    workers: int = Field(1, ge=1, le=256, description="processes that score, one thread each (CPU only); same bytes")


class Recipe(Strict):
    """The whole of a run."""

    run_dir: str = Field("runs/keepset", description="the run folder")
    seed: int = 0
    model: ModelSpec = ModelSpec()
    train_model: ModelSpec | None = Field(None, description="transfer: train another model than the one that scores")
    lora: LoraSpec = LoraSpec()
    pool: list[DataSpec] = Field(description="one or more pools")
    target: list[DataSpec] = Field(default_factory=list, description="few-shot validation rows or pairs")
    methods: list[MethodSpec] = Field(min_length=1)
    budget: list[int | str] = Field(
        ["5%"], min_length=1, description="rows (500), percentage (5%) or `200000 tokens`; several for a sweep"
    )
    mix: list[MixSpec] = Field(default_factory=list, description="training sets put together from several pools")
    variants: list[VariantSpec] = Field(
        default_factory=list, description="the same scoring with other keys, compared with this one (overlap.json)"
    )
    select: SelectSpec = SelectSpec()
    warmup: WarmupSpec = WarmupSpec()
    gradients: GradientSpec = GradientSpec()
    reference: ReferenceSpec = ReferenceSpec()
    train: TrainSpec = TrainSpec()
    train_seeds: list[int] = Field(default_factory=lambda: [0], description="every method's model is trained per seed")
    evaluate: EvaluateSpec = EvaluateSpec()
    controls: ControlSpec = ControlSpec()
    validation: ValidateSpec | None = Field(
        None, alias="validate", description="trainings that say what every score is worth: `keepset validate`"
    )
    batching: BatchSpec = BatchSpec()
    executor: ExecutorSpec = ExecutorSpec()
    strict: bool = Field(False, description="stop at the first bad row instead of quarantining it")

    @field_validator("methods", mode="before")
    @classmethod
    def _short_methods(cls, value: Any) -> Any:
        """`- davir` is short for `- {name: davir}`."""
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("pool", "target", mode="before")
    @classmethod
    def _short_data(cls, value: Any) -> Any:
        """A path, or one section, is short for a list of one."""
        value = value if isinstance(value, list) else [value]
        return [{"path": v} if isinstance(v, str) else v for v in value]

    @field_validator("budget", mode="before")
    @classmethod
    def _short_budget(cls, value: Any) -> Any:
        """`budget: 5%` is short for a list of one; each is checked here, before anything runs."""
        value = value if isinstance(value, list) else [value]
        for one in value:
            parse_budget(one, 1, None)
        return value

    @model_validator(mode="after")
    def _labels_differ(self) -> Recipe:
        labels = [m.label for m in self.methods] + [m.label for m in self.mix]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"methods: label '{twice[0]}' stands twice; give one of them its own `label`")
        names = "base|full|longest|dpo-direct" + ("|shortest" if self.controls.shortest else "")
        taken = [label for label in labels if re.fullmatch(rf"{names}|random-\d+", label)]
        if taken:
            raise ValueError(f"methods: label '{taken[0]}' is a control's name; give it another `label`")
        return self


def known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the keys allowed where `path` (a pydantic error location) points."""
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        section = _section_in(field.annotation) if field is not None else None
        if section is None:
            return []
        model = section
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The first section that a field's type holds, as in `list[DataSpec]` or `ModelSpec | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((one for inner in get_args(annotation) if (one := _section_in(inner)) is not None), None)


def parse_recipe(data: Any, *, where: str = "recipe", stored: bool = False) -> Recipe:
    """Check a mapping against `Recipe`.

    Messages begin with `where`. A `stored` recipe was taken up before: options that do nothing may stand in it.

    Raises:
        RecipeError: one line with the key's place, what is wrong and, for an unknown key, the closest known one.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: the top level must be a mapping of keys, not {type(data).__name__}")
    data = without_gone(data, where, stored)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "top level"
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            hint = did_you_mean(key, known_keys(Recipe, first["loc"]))
            raise RecipeError(f"{where}: unknown key '{place}'{hint}") from None
        raise RecipeError(f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
    if not stored:
        refuse_idle(recipe, [variant_recipe(recipe, variant, where) for variant in recipe.variants], where)
    return recipe


def variant_recipe(recipe: Recipe, variant: VariantSpec, where: str = "recipe") -> Recipe:
    """The recipe with the variant's keys; it scores, and trains no model on what it chooses.

    Raises:
        RecipeError: an unknown key, a value that doesn't fit it, or a key that does nothing in the variant.
    """
    data = recipe.model_dump(mode="json", exclude={"variants", "mix", "evaluate", "validation"})
    data["controls"] = {"random_seeds": [], "longest": False, "base": False}
    for key, value in variant.set.items():
        set_key(data, key, value)
    where = f"{where}: variants.{variant.label}"
    changed = parse_recipe(data, where=where, stored=True)  # what it changes may idle what is left
    for key, why in idle(changed):
        if key in variant.set:
            raise RecipeError(f"{where}: {key}: {why}")
    return changed


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; paths in it that aren't found from here are looked for in its folder (see `located`).

    Raises:
        RecipeError: unreadable file, YAML error (with its line), or anything `parse_recipe` refuses.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `keepset init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that is none is a ValueError
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)
        raise RecipeError(f"{path}{line}: not YAML: {problem.splitlines()[0] if problem else error!r}") from None
    return located(parse_recipe(data, where=str(path)), path.parent, here_first=True)
