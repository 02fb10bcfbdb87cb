"""Where the files stand that a recipe names by relative paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepset.recipe import Recipe

SETTINGS_FILES = ("deepspeed", "fsdp_config", "accelerator_config", "resume_from_checkpoint")
"""Arguments of SFTConfig that are settings or the path of a file with them."""


def located(recipe: Recipe, folder: Path, *, here_first: bool = False, real: bool = False) -> Recipe:
    """Return the recipe with `folder` put before the relative paths of what stands there: data, models, templates.

    Names of the hub, `demo`, and what isn't there stay as they are. With `here_first` a path that is found from the
    working directory stays as it is; `real`: absolute paths without links and `..`, also of what was absolute, to
    compare two recipes by.
    """

    def place(path: Any, there: Callable[[Path], bool] = Path.exists) -> Any:
        if not isinstance(path, str) or path in ("-", "plain") or (here_first and there(Path(path))):
            return path
        full = folder / Path(path).expanduser()
        if not there(full) or (Path(path).expanduser().is_absolute() and not real):
            return path
        return os.path.realpath(full) if real else str(full)

    def is_model(path: Path) -> bool:  # a folder that happens to be called like a hub name or `demo` is none
        return path.is_file() or any((path / name).is_file() for name in ("config.json", "adapter_config.json"))

    recipe = recipe.model_copy(deep=True)
    specs = [*recipe.pool, *recipe.target, *recipe.evaluate.pairs, *recipe.evaluate.heldout]
    for spec in [*specs, *([recipe.evaluate.gsm8k] if recipe.evaluate.gsm8k else [])]:
        spec.path = place(spec.path)
    for model in (recipe.model, recipe.train_model):
        if model:
            model.model_name_or_path = place(model.model_name_or_path, is_model)
            model.chat_template = place(model.chat_template, Path.is_file)
    for train in (recipe.train, recipe.reference, recipe.warmup):
        train.extra = {k: place(v) if k in SETTINGS_FILES else v for k, v in train.extra.items()}
    recipe.reference.path = place(recipe.reference.path, is_model)
    recipe.warmup.path = place(recipe.warmup.path)
    recipe.gradients.store = place(recipe.gradients.store)
    for variant in recipe.variants:
        for key, value in variant.set.items():
            last = key.rsplit(".", 1)[-1]
            if last in ("path", "store", "chat_template", "pool", "target", "model_name_or_path"):
                in_models = last == "model_name_or_path" or key == "reference.path"
                variant.set[key] = place(value, is_model if in_models else Path.exists)
    return recipe
