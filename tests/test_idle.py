"""An option that does nothing is refused in one line that names it; at its default, or with what it needs, it isn't."""

from __future__ import annotations

import pytest

from keepset.errors import RecipeError
from keepset.keys import set_key
from keepset.methods.table import check_options
from keepset.recipe import MethodSpec, parse_recipe, variant_recipe

BASE = {"pool": [{"path": "pool.jsonl"}], "target": ["shots.jsonl"], "methods": ["rose"]}
HELD = [{"path": "held.jsonl"}]

# key, value, what makes it count (None: nothing does here)
CASES = [
    ("pool.0.shots", 2, None),
    ("pool.0.length_matched", True, None),
    ("pool.0.task_column", "kind", None),
    ("evaluate.heldout.0.shots", 2, None),
    ("evaluate.heldout.0.pairs", True, None),
    ("evaluate.heldout.0.category_column", "kind", None),
    ("target.0.category_column", "kind", None),
    ("evaluate.pairs.0.category_column", "kind", None),
    ("evaluate.gsm8k.shots", 2, None),
    ("evaluate.gsm8k.pairs", True, None),
    ("evaluate.gsm8k_limit", 5, {"evaluate.gsm8k": {"path": "g.jsonl"}}),
    ("validate.block", 3, {"validate.leave_out": 4}),
    ("evaluate.max_new_tokens", 5, {"evaluate.gsm8k": {"path": "g.jsonl"}}),
    ("train.beta", 0.2, {"train.loss": "dpo"}),
    ("reference.beta", 0.2, {"reference.loss": "dpo"}),
    ("warmup.beta", 0.2, {"warmup.loss": "dpo"}),
    ("warmup.full", True, None),
    ("reference.folds", 1, None),
    ("gradients.store_dim", 64, {"gradients.store": "s"}),
    ("gradients.store_error", 0.1, {"gradients.store": "s"}),
    ("gradients.store_dtype", "int8", {"gradients.store": "s"}),
    ("gradients.store_sample", 3, {"gradients.store": "s"}),
    ("select.quota_by", "category", {"select.quota": "equal"}),
    ("select.quota_floor", 0.1, {"select.quota": "floor"}),
    ("select.near_threshold", 0.7, {"select.dedup": "near"}),
    ("select.diversity", 0.5, {"select.policy": "facility_location"}),
    ("select.temperature", 0.5, {"select.policy": "sample"}),
    ("select.knn_alpha", 0.7, {"select.policy": "knn_kde"}),
    ("select.transport_reg", 0.1, {"select.policy": "transport"}),
]  # fmt: skip
# key, value, and what makes it idle
TOGETHER = [
    ("evaluate.each_epoch", True, {"train.full": True}),
    ("validate.again", 5, {"validate.models": 0}),
    ("validate.again", 5, {"validate.seeds": [3]}),
    ("evaluate.headline", "loss.chosen", {"evaluate.pairs": [], "evaluate.heldout": []}),
    ("reference.path", "r", {"reference.folds": 2}),
    ("reference.full", True, {"reference.folds": 2}),
    ("reference.learning_rate", 0.1, {"reference.path": "r"}),
    ("reference.fraction", 0.1, {"reference.path": "r"}),
    ("warmup.num_train_epochs", 2, {"warmup.path": "w"}),
    ("warmup.fraction", 0.5, {"warmup.path": "w"}),
    ("gradients.store_error", 0.1, {"gradients.store": "s", "gradients.store_dim": 64}),
    ("mix.0.parts.0.budget", "10%", {"mix": [{"label": "m", "parts": [{"source": "pool"}]}]}),
]


def made(**keys):
    data = {**{k: [dict(v) if isinstance(v, dict) else v for v in x] for k, x in BASE.items()}}
    data["target"] = [{"path": "shots.jsonl"}]
    data["evaluate"] = {"heldout": [dict(HELD[0])], "pairs": [dict(HELD[0])]}
    if any(key.startswith("evaluate.gsm8k.") for key in keys):
        data["evaluate"]["gsm8k"] = {"path": "g.jsonl"}
    for key, value in keys.items():
        set_key(data, key, value)
    return data


@pytest.mark.parametrize(("key", "value", "counts"), CASES)
def test_what_does_nothing_is_refused(key, value, counts):
    with pytest.raises(RecipeError, match=rf"^recipe: {key}: [^\n]+$"):
        parse_recipe(made(**{key: value}))
    parse_recipe(made(**{key: value}), stored=True)
    if counts is not None:
        parse_recipe(made(**counts, **{key: value}))


@pytest.mark.parametrize(("key", "value", "idle"), TOGETHER)
def test_what_another_key_makes_idle_is_refused(key, value, idle):
    with pytest.raises(RecipeError, match=rf"^recipe: {key}: [^\n]+$"):
        parse_recipe(made(**idle, **{key: value}))
    if not key.startswith(("mix", "gradients")):
        parse_recipe(made(**{key: value}))


def test_defaults_said_aloud_are_no_mistake():
    parse_recipe(parse_recipe(made()).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "option", "value", "counts"),
    [
        ("rds", "pooling", "weighted_mean", {}),
        ("dsir", "reduce", "mean", {"by_task": True}),
        ("dsir", "seed", 3, {}),
        ("rose", "beta", 0.5, {"normalise": "task"}),
        ("rose", "reference", "none", {"normalise": "task"}),
        ("influence", "labels", "data", {}),
        ("tmc-shapley", "rows_per_player", 3, {"players": "source"}),
    ],
)
def test_a_method_s_idle_option_is_refused(name, option, value, counts):
    idle = {
        "rds": {"embedding_model": "e"}, "influence": {"curvature": "gauss-newton"},
        "dsir": {"gumbel": False} if option == "seed" else {},
    }.get(name, {})  # fmt: skip
    with pytest.raises(RecipeError, match=f"^method {name}: {option} does nothing here: [^\n]+$"):
        check_options(MethodSpec(name=name, options={**idle, option: value}))
    check_options(MethodSpec(name=name, options={**counts, option: value}))


def test_shots_of_a_method_without_a_target():
    with pytest.raises(RecipeError, match="^method davir: shots does nothing here"):
        check_options(MethodSpec(name="davir", shots=2))
    check_options(MethodSpec(name="bm25", shots=2))


def test_an_option_that_counts_in_a_variant_counts():
    data = made(**{"select.quota_by": "category"})
    data["variants"] = [{"label": "equal", "set": {"select.quota": "equal"}}]
    parse_recipe(data)
    data["variants"] = [{"label": "other", "set": {"seed": 3}}]
    with pytest.raises(RecipeError, match="select.quota_by"):
        parse_recipe(data)
    data = made(variants=[{"label": "other", "set": {"pool.0.shots": 3}}])
    with pytest.raises(RecipeError, match="^recipe: variants.other: pool.0.shots: "):
        parse_recipe(data)
    stored = parse_recipe(data, stored=True)  # as a run folder holds it, from a version that took it
    with pytest.raises(RecipeError, match="^recipe: variants.other: pool.0.shots: "):
        variant_recipe(stored, stored.variants[0])
