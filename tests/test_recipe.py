"""Recipes: short forms, refusals with a did-you-mean, round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keepset.budget_text import parse_budget
from keepset.errors import RecipeError
from keepset.recipe import Recipe, load_recipe, parse_recipe

SMALL = {"pool": "a.jsonl", "methods": ["davir"]}


def test_short_forms():
    recipe = parse_recipe(
        {"pool": "a.jsonl", "target": ["b.jsonl"], "methods": ["rose", {"name": "davir"}], "budget": 7}
    )
    assert recipe.pool[0].path == "a.jsonl" and recipe.target[0].path == "b.jsonl"
    assert [m.label for m in recipe.methods] == ["rose", "davir"]
    assert recipe.budget == [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmpu": {}}, r"unknown key 'warmpu' \(did you mean 'warmup'\?\)"),
        ({"warmup": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"pool": [{"path": "a", "limt": 3}]}, "did you mean 'limit'"),
        ({"evaluate": {"pairs": [{"path": "a", "shotz": 3}]}}, "did you mean 'shots'"),
        ({"methods": []}, "methods"),
        ({"methods": ["rose", "rose"]}, "label 'rose' stands twice"),
        ({"methods": [{"name": "davir", "label": "random-0"}]}, "is a control's name"),
        ({"methods": ["rose"], "mix": [{"label": "rose", "parts": [{"source": "a"}]}]}, "label 'rose' stands twice"),
        ({"methods": [{"name": "rose", "label": "../up"}]}, "letters, digits"),
        ({"budget": "5%%"}, "budget '5%%' is not a count"),
        ({"budget": "0"}, "is not a count"),
        ({"budget": "120%"}, "is not a count"),
        ({"model": {"dtype": "int3"}}, "model.dtype"),
        ({"lora": {"lora_r": 0}}, "lora.lora_r"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe({**SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "rows", "tokens", "want"),
    [
        (500, 10_000, None, ("rows", 500)),
        ("5%", 270_679, None, ("rows", 13_533)),
        ("16.7 %", 1000, None, ("rows", 167)),
        ("200_000 tokens", 10, None, ("tokens", 200_000)),
        ("20% tokens", 10, 500, ("tokens", 100)),
        ("0.001%", 10, None, ("rows", 1)),
    ],
)
def test_budgets(budget, rows, tokens, want):
    assert parse_budget(budget, rows, tokens) == want


@given(
    st.sampled_from(["davir", "rose", "random"]),
    st.integers(0, 2**31),
    st.sampled_from(["1%", "5%", 100, "200 tokens"]),
    st.floats(0.001, 1),
    st.booleans(),
)
def test_yaml_round_trip(method, seed, budget, fraction, longest):
    recipe = parse_recipe(
        {"pool": "a.jsonl", "methods": [method], "seed": seed, "budget": budget,
         "warmup": {"fraction": fraction}, "controls": {"longest": longest}}
    )  # fmt: skip
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


def test_paths_beside_the_recipe_are_found(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text("pool: a.jsonl\nmethods: [davir]\n")
    assert load_recipe(path).pool[0].path == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pool: [", r"recipe.yaml:1: not YAML|recipe.yaml:2: not YAML"),
        ("- a", "top level must be a mapping"),
        ("", "mapping"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_every_field_that_is_not_a_plain_section_or_hf_name_is_described():
    hf = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "num_train_epochs", "learning_rate",
          "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio",
          "weight_decay", "max_grad_norm", "model_revision", "label", "name", "max_new_tokens", "gsm8k_limit",
          "seed", "policy"}  # fmt: skip
    from keepset import recipe as module

    for section in vars(module).values():
        if isinstance(section, type) and issubclass(section, module.Strict) and section not in (module.Strict, Recipe):
            for name, field in section.model_fields.items():
                assert field.description or name in hf, f"{section.__name__}.{name} has no description"


def test_paths_are_found_beside_the_recipe_and_names_stay(tmp_path, monkeypatch):
    """Data, models, templates and settings files; `demo`, hub names and what isn't there are left alone."""
    home, away = tmp_path / "home", tmp_path / "away"
    for name in ("m", "adapter", "owner/name", "demo", "warm", "store"):
        (home / name).mkdir(parents=True)
    away.mkdir()
    (home / "m" / "config.json").write_text("{}")
    (home / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("pool.jsonl", "t.jinja", "ds.json", "own.gguf"):
        (home / name).write_text("{}")
    said = {
        "model": {"model_name_or_path": "m", "chat_template": "t.jinja"},
        "train_model": {"model_name_or_path": "owner/name", "chat_template": "plain"},
        "pool": ["pool.jsonl", "-", "owner/data:main", "missing.jsonl", str(home / "pool.jsonl")],
        "target": {"path": "pool.jsonl"},
        "methods": ["random"],
        "reference": {"path": "adapter"},
        "warmup": {"path": "warm"},
        "gradients": {"store": "store"},
        "train": {"extra": {"deepspeed": "ds.json", "run_name": "ds.json"}},
        "evaluate": {"gsm8k": {"path": "pool.jsonl"}},
        "variants": [{"label": "v", "set": {"model.model_name_or_path": "own.gguf", "seed": 1, "reference.path": "m"}}],
    }
    (home / "r.yaml").write_text(yaml.safe_dump(said))
    monkeypatch.chdir(away)
    found = load_recipe(Path("../home/r.yaml"))
    there = Path("../home")
    assert (found.model.model_name_or_path, found.model.chat_template) == (str(there / "m"), str(there / "t.jinja"))
    assert (found.train_model.model_name_or_path, found.train_model.chat_template) == ("owner/name", "plain")
    paths = [str(there / "pool.jsonl"), "-", "owner/data:main", "missing.jsonl", str(home / "pool.jsonl")]
    assert [spec.path for spec in found.pool] == paths
    assert (found.reference.path, found.warmup.path) == (str(there / "adapter"), str(there / "warm"))
    assert found.gradients.store == str(there / "store") and found.evaluate.gsm8k.path == str(there / "pool.jsonl")
    assert found.train.extra == {"deepspeed": str(there / "ds.json"), "run_name": "ds.json"}
    assert found.variants[0].set == {
        "model.model_name_or_path": str(there / "own.gguf"), "seed": 1, "reference.path": str(there / "m")
    }  # fmt: skip
    (home / "d.yaml").write_text("model: {model_name_or_path: demo}\npool: pool.jsonl\nmethods: [random]\n")
    assert load_recipe("../home/d.yaml").model.model_name_or_path == "demo"  # the folder `demo` holds no model
    (away / "pool.jsonl").write_text("{}")
    assert load_recipe("../home/d.yaml").pool[0].path == "pool.jsonl"
