"""Stored scores are kept exactly as long as nothing they depend on has changed: each recipe field, each method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from rich.console import Console

from keepset.keys import set_key
from keepset.methods.table import METHODS, method_of
from keepset.pipeline.score import score_key, scored, stages_of
from keepset.recipe import MethodSpec, Recipe, parse_recipe
from keepset.runfolder.files import digest, digest_list
from keepset.stages.job import Job
from keepset.stages.stage import VERSION
from tiny_recipe import quiet, recipe

TEXT = {"random", "length", "bm25", "dsir"}
STATES = {"rds", "rds+", "knn-shapley"}
BASE = {"perplexity", "loss", "ifd", "el2n"}
REFERENCE = {"davir", "davir-ref", "rho-sum", "rho-mean", "instructdiff", "loss-ref"}
LAST = {"influence", "datainf", "ekfac", "gist"}  # of the warm-up's checkpoints the last one alone
GRADIENTS = {"rose", "less", "tracin", "grad-cosine", "grad-norm", *LAST}
WARM = {"forgetting", "in-run-shapley", *GRADIENTS}
REPLAYED = {"metagradient"}
RETRAINED = {"tmc-shapley", *REPLAYED}
MODEL = STATES | BASE | REFERENCE | WARM | RETRAINED
TARGET = {"bm25", "dsir", "in-run-shapley"} | STATES | GRADIENTS | RETRAINED
ALL, NONE = TEXT | MODEL, set[str]()

# field of the recipe -> [(another value, the methods whose scores may depend on it)]
FIELDS: dict[str, list[tuple[Any, set[str]]]] = {
    "run_dir": [],  # every case has another
    "seed": [(5, REFERENCE | WARM)],  # the others draw by their own `seed` option, or not at all
    "model.model_name_or_path": [("OTHER", MODEL)],  # other weights, the same tokenizer
    "model.dtype": [("bfloat16", MODEL)],
    "model.device": [("cpu", NONE)],
    "model.attn_implementation": [("sdpa", NONE)],  # within the noise, as batches are
    "model.model_revision": [("main", NONE)],  # of a folder there is none
    "model.trust_remote_code": [],  # needs a model from the hub
    "model.chat_template": [("plain", ALL)],  # usable rows and their lengths
    "model.supervise": [("last", ALL)],
    "model.max_length": [(150, ALL)],
    "model.overlong": [("truncate", ALL)],
    "train_model": [({"model_name_or_path": "OTHER"}, NONE)],
    "lora.lora_r": [(3, REFERENCE | WARM | RETRAINED)],
    "lora.lora_alpha": [(5, REFERENCE | WARM | RETRAINED)],
    "lora.lora_dropout": [(0.1, REFERENCE | WARM | RETRAINED)],
    "lora.lora_target_modules": [("all-linear", REFERENCE | WARM | RETRAINED)],
    "pool": [("MORE", ALL), ([{"path": "POOL", "name": "x"}], ALL),  # the source stands beside the score
             ([{"path": "POOL", "category_column": "instruction"}], ALL)],
    "target": [("EVALUATION", TARGET), ([{"path": "TARGET", "task_column": "prompt"}], TARGET)],
    "methods": [],  # options: see below
    "budget": [("50%", NONE)],
    "mix": [([{"label": "m", "parts": [{"source": "pool"}]}], NONE)],
    "variants": [([{"label": "v", "set": {"seed": 3}}], NONE)],
    "select": [({"policy": "mmr", "dedup": "exact"}, NONE)],
    "evaluate": [({"pairs": [{"path": "TARGET"}], "bootstrap": 200}, NONE)],
    "validation": [],  # `validate` looks at scores
    "controls": [({"random_seeds": [7]}, NONE)],
    "train_seeds": [([1, 2], NONE)],
    "strict": [(False, NONE)],
    "batching": [({"token_budget": 128, "shard_rows": 4, "workers": 2}, NONE)],
    "executor": [({"name": "ray", "address": "auto", "workers": 2}, NONE)],
    "gradients.store": [("STORE", GRADIENTS)],
    "gradients.store_dim": [],  # with a store: see below
    "gradients.store_error": [],
    "gradients.store_dtype": [],
    "gradients.store_sample": [],
    "gradients.last_layers": [(1, GRADIENTS)],
    "gradients.max_completion_tokens": [(3, GRADIENTS)],
    "reference.path": [],  # see below
    "reference.folds": [(2, REFERENCE)],
    "reference.fraction": [(0.5, REFERENCE)],
    "warmup.path": [],  # see below
    "warmup.fraction": [(0.5, WARM)],
    "warmup.min_rows": [(11, WARM)],
    "warmup.checkpoints": [("last", WARM - LAST - {"in-run-shapley"})],
    "warmup.seed": [(5, WARM)],
}  # fmt: skip
TRAINING = {
    "num_train_epochs": 3, "learning_rate": 0.02, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
    "num_processes": 2,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1, "max_grad_norm": 0.5, "full": True,
    "loss": None, "beta": None, "extra": {"adam_beta2": 0.9},
}  # fmt: skip
RETRAINING = {"num_train_epochs", "learning_rate", "per_device_train_batch_size"}
for name, value in TRAINING.items():  # `loss` and `beta` are of pools of pairs: see below
    told = [] if value is None else [(value, REFERENCE)]
    FIELDS[f"reference.{name}"] = told
    FIELDS[f"warmup.{name}"] = [] if name == "full" else [(v, WARM) for v, _ in told]
    FIELDS[f"train.{name}"] = [(v, RETRAINED if name in RETRAINING else REPLAYED) for v, _ in told]


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every field of the recipe; what is a list, and the sections that no score looks at, as a whole."""
    found = set()
    for name, field in model.model_fields.items():
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        section = next((k for k in kinds if issubclass(k, BaseModel)), None)
        whole = prefix + name in FIELDS or section is None
        found |= {prefix + name} if whole else leaves(section, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def test_the_table_knows_every_field_and_every_method():
    assert leaves(Recipe) == set(FIELDS)
    assert set(METHODS) == ALL


def keys(made: Recipe, names: set[str] = ALL) -> dict[str, str]:
    job = Job(made, console=Console(quiet=True))
    return {name: score_key(job, MethodSpec(name=name)) for name in sorted(names)}


def with_field(base: dict[str, Any], key: str, value: Any, run_dir: Path) -> Recipe:
    made = json.loads(json.dumps(base)) | {"run_dir": str(run_dir)}
    set_key(made, key, value)
    return parse_recipe(made)


@pytest.fixture(scope="module")
def base(model_folder, data, tmp_path_factory):
    """A recipe, its keys, and a way to name files in the table."""
    folder = tmp_path_factory.mktemp("keys")
    made = recipe(model_folder, data, folder / "run").model_dump(mode="json")
    (folder / "more.jsonl").write_text(
        Path(data["pool"]).read_text() + '{"instruction": "a", "input": "", "output": "b"}\n'
    )
    shutil.copytree(model_folder, folder / "other")
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "other/model.safetensors")
    save_file({k: v + torch.ones_like(v) for k, v in weights.items()}, folder / "other/model.safetensors")
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file({"lora": torch.ones(2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    places = {
        "OTHER": folder / "other", "MORE": folder / "more.jsonl", "POOL": data["pool"], "TARGET": data["target"],
        "EVALUATION": data["pairs"], "STORE": folder / "store", "ADAPTER": adapter,
    }  # fmt: skip
    return made, keys(parse_recipe(made)), {k: str(v) for k, v in places.items()}


@pytest.mark.parametrize("field", [name for name, cases in FIELDS.items() if cases])
def test_a_field_changes_the_keys_of_the_methods_that_depend_on_it_and_no_others(field, base, tmp_path):
    made, before, places = base
    for k, (value, expected) in enumerate(FIELDS[field]):
        text = json.dumps(value)
        for name, place in places.items():
            text = text.replace(f'"{name}"', json.dumps(place))
        after = keys(with_field(made, field, json.loads(text), tmp_path / str(k)))
        assert {name for name in ALL if after[name] != before[name]} == expected, (field, value)


def test_the_draw_of_shots_hangs_on_the_seed(base, tmp_path):
    made, _, _ = base
    drawn = json.loads(json.dumps(made))
    drawn["target"][0]["shots"] = 1
    first, other = (keys(with_field(drawn, "seed", seed, tmp_path / str(seed))) for seed in (0, 1))
    assert {name for name in ALL if first[name] != other[name]} == TARGET | REFERENCE | WARM
    job = Job(parse_recipe(made | {"run_dir": str(tmp_path / "v")}), console=Console(quiet=True))
    for name in TARGET:
        assert score_key(job, MethodSpec(name=name)) != score_key(job, MethodSpec(name=name, shots=1))


@pytest.mark.parametrize(
    ("field", "value"), [("store_dim", 64), ("store_error", 0.05), ("store_dtype", "int8"), ("store_sample", 3)]
)
def test_what_a_store_holds(field, value, base, tmp_path):
    made, _, places = base
    stored = made | {"gradients": {"store": places["STORE"]}}
    first = keys(parse_recipe(stored | {"run_dir": str(tmp_path / "a")}), GRADIENTS)
    other = keys(with_field(stored, f"gradients.{field}", value, tmp_path / "b"), GRADIENTS)
    assert all(first[name] != other[name] for name in GRADIENTS)
    place = keys(with_field(stored, "gradients.store", str(tmp_path / "moved"), tmp_path / "c"), GRADIENTS)
    assert place == first


def test_a_reference_from_elsewhere_is_its_weights(base, tmp_path):
    made, before, places = base
    given = parse_recipe(made | {"run_dir": str(tmp_path), "reference": {"path": places["ADAPTER"]}})
    after = keys(given)
    assert {name for name in ALL if after[name] != before[name]} == REFERENCE
    weights = Path(places["ADAPTER"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert {name for name, key in keys(given).items() if key != after[name]} == REFERENCE


def test_a_warm_up_from_elsewhere_is_its_checkpoints(base, tmp_path):
    made, _, _ = base
    for step in (1, 2):
        folder = tmp_path / f"warm/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"mean_lr": 0.1, "step": step}))
        (folder / "adapter_model.safetensors").write_text("a")
    given = parse_recipe(made | {"run_dir": str(tmp_path / "run"), "warmup": {"path": str(tmp_path / "warm")}})
    before = keys(given, WARM)
    (tmp_path / "warm/checkpoint-1/adapter_model.safetensors").write_text("b")
    after = keys(given, WARM)
    assert {n for n in WARM if after[n] != before[n]} == WARM - LAST - {"in-run-shapley"}
    (tmp_path / "warm/checkpoint-2/meta.json").write_text(json.dumps({"mean_lr": 0.2, "step": 2}))
    assert all(value != after[name] for name, value in keys(given, WARM).items())


CHANGED: dict[Any, Any] = {
    "high": "low", "low": "high", "mid": "low", "long": "short", "max": "mean", "mean": "max", "sum": "mean", 0: 1,
    "prompt": "prompt+chosen", "prompt+chosen": "prompt", "last": "weighted_mean", "weighted_mean": "last",
    "task": "query", "ce": "focal", "chosen": "margin", "dpo": "margin", "sft": "dpo", "adam": "sgd", "base": "none",
    "row": "source", "fisher": "gauss-newton", "sampled": "data", "data": "sampled", "all": "matrix", "first": "second",
    "pair": "task",
}  # fmt: skip


def other_value(value: Any) -> Any:
    return not value if isinstance(value, bool) else CHANGED[value] if isinstance(value, str) else value + 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_counts_and_a_default_said_aloud_does_not(name, base, tmp_path):
    job = Job(parse_recipe(base[0] | {"run_dir": str(tmp_path)}), console=Console(quiet=True))
    options = {k: default for k, (_, default) in METHODS[name].options().items()}
    pairs = Job(parse_recipe(pairs_pool(base, tmp_path / "pairs")), console=Console(quiet=True))
    plain = score_key(job, MethodSpec(name=name))
    assert score_key(job, MethodSpec(name=name, options=options, label="aloud")) == plain
    for key, value in options.items():
        if key == "embedding_model":  # see below
            continue
        own, before = (pairs, score_key(pairs, MethodSpec(name=name))) if key == "side" else (job, plain)
        assert score_key(own, MethodSpec(name=name, options={key: other_value(value)})) != before, key


def test_an_embedding_model_s_weights_count_and_the_scoring_model_s_do_not(base, encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    spec = MethodSpec(name="rds", options={"embedding_model": str(folder)})

    def key(**more: Any) -> str:
        made = parse_recipe(base[0] | {"run_dir": str(tmp_path / "run"), **more})
        return score_key(Job(made, console=Console(quiet=True), force=True), spec)

    before = key()
    assert key(model=base[0]["model"] | {"dtype": "bfloat16"}) == before
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert key() != before


def pairs_pool(base: Any, run_dir: Path, **train: Any) -> dict[str, Any]:
    made, _, places = base
    more = {"name": "rose", "options": {"map": "sgd"}}
    train = {**made["train"], "loss": "dpo", **train}
    return made | {
        "run_dir": str(run_dir), "pool": [{"path": places["EVALUATION"], "pairs": True}], "methods": [more],
        "train": train,
    }  # fmt: skip


def test_the_loss_of_pairs_counts_for_gradients(base, tmp_path):
    first = keys(parse_recipe(pairs_pool(base, tmp_path / "a")))
    for k, change in enumerate(({"loss": "ipo"}, {"beta": 0.7})):
        other = keys(parse_recipe(pairs_pool(base, tmp_path / str(k), **change)))
        assert {name for name in ALL if other[name] != first[name]} == GRADIENTS | REPLAYED
    plain = keys(parse_recipe(pairs_pool(base, tmp_path / "sft", loss="sft")))
    assert {name for name in ALL if plain[name] != first[name]} == GRADIENTS | REPLAYED
    reference = pairs_pool(base, tmp_path / "r") | {"reference": {**base[0]["reference"], "loss": "dpo"}}
    trained = keys(parse_recipe(reference))
    assert {name for name in ALL if trained[name] != first[name]} == REFERENCE


def test_another_train_loss_scores_again(base, tmp_path):
    """What the key is for: the folder's scores of another pair loss are not taken for this one's."""
    said = Console(record=True, file=(tmp_path / "log").open("w"), width=200)
    tables = []
    for loss in ("dpo", "ipo", "ipo"):
        made = parse_recipe(pairs_pool(base, tmp_path / "run", loss=loss, num_train_epochs=1))
        job = Job(made, console=said, force=True)
        scored(job, made.methods[0])
        tables.append(job.run.load_table("scores/rose.parquet")["score"].to_pylist())
    assert tables[0] != tables[1] == tables[2]
    assert said.export_text().count("scored before, kept") == 1


def test_the_key_is_the_hash_of_one_mapping_though_it_is_never_made_as_a_whole(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["random"]), console=quiet(), text_only=True)
    (spec,) = job.recipe.methods
    method = method_of(spec)
    assert score_key(job, spec) == digest(
        {
            "version": VERSION, "method": [spec.name, {name: getattr(method, name) for name in method.options()}],
            "ids": digest([str(i) for i in job.ids]), "pool": [job.pool.fingerprint(), job.pool.has_pairs],
            "columns": [job.pool.sources().tolist(), job.pool.categories().tolist()], "encoder": None, "target": None,
            "stages": {name: stage.id(job) for name, stage in stages_of(job, spec).items()},
        }
    )  # fmt: skip
    for values in ([], ["a"], ["é", None, 'x"'] * 20_000):
        assert digest_list(values) == digest(values)
