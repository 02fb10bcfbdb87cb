"""From a `TrainSpec` to TRL's configuration: one place where defaults are set and unknown arguments are refused."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from keepset.errors import RecipeError, did_you_mean
from keepset.recipe import TrainSpec
from keepset.train.training import WORK, Training

Config = TypeVar("Config")

# What keepset decides itself: where things go, the seed, that nothing is truncated, and who is told about it.
OURS = ("output_dir", "seed", "max_length", "dataset_kwargs", "dataset_text_field", "push_to_hub")

TRACKERS = ("trackio", "wandb", "tensorboard")  # the trainer looks for these only after the model is loaded


def trainer_config(config_class: type[Config], training: Training, out: Path, **more: Any) -> Config:
    """Build an SFTConfig, DPOConfig or RewardConfig whose checkpoints go to the work folder inside `out`.

    keepset's defaults where TRL's would change numbers or cost time: no truncation (`max_length=None`), no mixed
    precision (weights keep `ModelSpec.dtype`), no gradient checkpointing, every step logged, a checkpoint an epoch of
    which the last two are kept (all with `training.moments`), nothing reported to a service. `args.extra` overrides
    them: `report_to: trackio`, `wandb` or `tensorboard` is passed through. `more` are the caller's own defaults.

    Raises:
        RecipeError: `extra` holds an argument the class doesn't have, or one that has its own key in the recipe.
    """
    args = training.args
    _check_extra(config_class, args)
    if args.per_device_train_batch_size % args.num_processes:
        raise RecipeError(
            f"num_processes: {args.num_processes} don't share a batch of {args.per_device_train_batch_size} evenly; "
            "change per_device_train_batch_size"
        )
    if not 0 <= args.warmup_ratio < 1:
        raise RecipeError(f"warmup_ratio: {args.warmup_ratio} is not a share of the steps, 0 <= warmup_ratio < 1")
    settings: dict[str, Any] = {
        "num_train_epochs": args.num_train_epochs,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.per_device_train_batch_size // args.num_processes,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_ratio,  # below 1 transformers reads it as a share, rounded up
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log the mean in place of a NaN
        "save_strategy": "epoch",
        # the trainer drops the older one before the newer one counts
        "save_total_limit": None if training.moments else 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": training.model.device == "cpu",
        **more,
        **args.extra,
        "output_dir": str(out / WORK),
        "seed": training.seed,
        "max_length": None,
    }
    try:
        config = config_class(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training arguments: {str(error).splitlines()[0]}") from None
    started: int = config.world_size  # type: ignore[attr-defined]
    if args.num_processes not in (1, started):
        raise RecipeError(
            f"num_processes: {args.num_processes}, and {started} were started: it is of a recipe, whose `keepset run` "
            "starts them; `keepset train` takes the number of `accelerate launch`"
        )
    return config


def _check_extra(config_class: type[Any], args: TrainSpec) -> None:
    arguments = [f.name for f in fields(config_class) if f.init]
    own = [name for name in TrainSpec.model_fields if name != "extra"]
    for name in args.extra:
        if name in OURS:
            raise RecipeError(f"extra.{name}: keepset sets this itself; remove it")
        if name in own:
            raise RecipeError(f"extra.{name}: set `{name}` beside `extra`, not inside it")
        if name not in arguments:
            raise RecipeError(
                f"extra.{name}: {config_class.__name__} has no such argument{did_you_mean(name, arguments)}"
            )
    trackers = args.extra.get("report_to") or []
    for name in [trackers] if isinstance(trackers, str) else trackers:
        if name in TRACKERS and find_spec(name) is None:
            raise RecipeError(f"extra.report_to: {name} is not installed: pip install {name}")
