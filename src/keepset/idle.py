"""Options that would do nothing, refused: whoever sets one believes that it counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from keepset.errors import RecipeError

if TYPE_CHECKING:
    from keepset.recipe import Recipe

TRAINING = (
    "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_processes",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "full", "loss", "beta", "extra",
)  # fmt: skip
SHOTS = ("shots", "length_matched", "task_column")
STORE = ("store_dim", "store_error", "store_dtype", "store_sample")


def refuse_idle(recipe: Recipe, variants: Sequence[Recipe], where: str) -> None:
    """Refuse what no step of the recipe or of its variants would look at. An option at its default says nothing.

    Args:
        recipe: the recipe.
        variants: the recipes that its `variants` make of it.
        where: what messages begin with.

    Raises:
        RecipeError: one line with the key's place, why it does nothing, and what to do.
    """
    for key, why in idle(recipe):
        of_all = key.startswith(("mix", "evaluate", "validate"))  # which variants don't have
        if of_all or all(key in dict(idle(variant)) for variant in variants):
            raise RecipeError(f"{where}: {key}: {why}")


def idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the place of every option that does nothing in this recipe, and why with the remedy."""

    def said(place: str, section: Any, names: tuple[str, ...], why: str, *, when: bool = True) -> Iterator[Any]:
        return ((f"{place}.{name}", why) for name in names if when and changed(section, name))

    evaluate, select, gradients = recipe.evaluate, recipe.select, recipe.gradients
    for place, specs in (("pool", recipe.pool), ("evaluate.heldout", evaluate.heldout)):
        for k, spec in enumerate(specs):
            yield from said(f"{place}.{k}", spec, SHOTS, "is of targets and evaluate.pairs and does nothing here; "
                            "remove it (`limit` takes a file's first rows)")  # fmt: skip
    for k, spec in enumerate(evaluate.heldout):
        yield from said(f"evaluate.heldout.{k}", spec, ("pairs", "category_column"), "is of pools; remove it")
    for place, specs in (("target", recipe.target), ("evaluate.pairs", evaluate.pairs)):
        for k, spec in enumerate(specs):
            yield from said(f"{place}.{k}", spec, ("category_column",), "is of pools; remove it")
    none = ("pairs", "category_column", "name", *SHOTS)
    yield from said("evaluate.gsm8k", evaluate.gsm8k, none, "does nothing here; remove it", when=bool(evaluate.gsm8k))
    yield from said("evaluate", evaluate, ("gsm8k_limit", "max_new_tokens"), "does nothing without `gsm8k`; remove it",
                    when=evaluate.gsm8k is None)  # fmt: skip
    yield from said("evaluate", evaluate, ("each_epoch",), "epochs' ends are kept of adapters only; remove it, or "
                    "train.full", when=recipe.train.full)  # fmt: skip
    measured = bool(evaluate.pairs or evaluate.heldout or evaluate.gsm8k)
    yield from said("evaluate", evaluate, ("headline",), "does nothing without held-out data; remove it",
                    when=not measured)  # fmt: skip
    if recipe.validation is not None:
        truth = recipe.validation
        yield from said("validate", truth, ("block",), "does nothing without `leave_out`; remove it",
                        when=not truth.leave_out)  # fmt: skip
        yield from said("validate", truth, ("again",), "does nothing without `models` and two `seeds`; remove it",
                        when=not truth.models or len(truth.seeds) < 2)  # fmt: skip
    for name in ("train", "reference", "warmup"):
        section = getattr(recipe, name)
        yield from said(name, section, ("beta",), "does nothing under `loss: sft`; remove it, or set a loss of pairs",
                        when=section.loss == "sft")  # fmt: skip
    reference, warmup = recipe.reference, recipe.warmup
    yield from said("warmup", warmup, ("full",), "the warm-up is a LoRA, whose gradients are taken; remove it")
    yield from said("reference", reference, ("folds",), "one fold leaves no row to train on; take 2 or more",
                    when=reference.folds == 1)  # fmt: skip
    yield from said("reference", reference, ("path", "full"), "cross-fitting (`folds`) trains a LoRA a fold; remove it",
                    when=reference.folds >= 2)  # fmt: skip
    yield from said("reference", reference, (*TRAINING, "fraction"), "with `path` no reference is trained; remove it, "
                    "or the path", when=bool(reference.path))  # fmt: skip
    yield from said("warmup", warmup, (*TRAINING, "fraction", "min_rows", "seed"), "with `path` nothing is trained; "
                    "remove it, or the path", when=bool(warmup.path))  # fmt: skip
    yield from said("gradients", gradients, STORE, "does nothing without `store`; remove it",
                    when=gradients.store is None)  # fmt: skip
    yield from said("gradients", gradients, ("store_error",), "`store_dim` sets the size; remove one of them",
                    when=gradients.store_dim is not None)  # fmt: skip
    for name, needs, there in (
        ("quota_by", "a `quota`", select.quota != "none"),
        ("quota_floor", "`quota: floor`", select.quota == "floor"),
        ("near_threshold", "`dedup: near`", select.dedup == "near"),
        ("diversity", "`policy: mmr` or `facility_location`", select.policy in ("mmr", "facility_location")),
        ("temperature", "`policy: sample`", select.policy == "sample"),
        ("knn_alpha", "`policy: knn_kde`", select.policy == "knn_kde"),
        ("transport_reg", "`policy: transport`", select.policy == "transport"),
    ):
        yield from said("select", select, (name,), f"does nothing without {needs}; remove it", when=not there)
    yield from said("executor", recipe.executor, ("address", "workers"), "does nothing without `name: ray`; remove it",
                    when=recipe.executor.name != "ray")  # fmt: skip
    for k, mix in enumerate(recipe.mix):
        for m, part in enumerate(mix.parts):
            yield from said(f"mix.{k}.parts.{m}", part, ("budget",), "`method: full` takes the whole pool; remove it, "
                            "or name a method that ranks", when=part.method == "full")  # fmt: skip


def changed(section: BaseModel, name: str) -> bool:
    """Whether an option has another value than its default."""
    default: Any = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) != default)
