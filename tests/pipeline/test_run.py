"""The whole job on a tiny model: every method, controls, training, evaluation, comparison, and re-runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from keepset.errors import DataError, PlanMismatch, RecipeError
from keepset.methods.table import METHODS
from keepset.pipeline import run_recipe
from keepset.pipeline.choose import choose
from keepset.pipeline.compare import compare
from keepset.pipeline.run import evaluated_cells
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec, load_recipe
from keepset.runfolder.records import Items
from keepset.stages.job import Job
from tiny_recipe import TRAIN, quiet, recipe


@pytest.fixture(scope="module")
def finished(model_folder, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    progress, table = quiet(), quiet()
    run_recipe(recipe(model_folder, data, run_dir), console=progress, out=table)
    return run_dir, progress.file.getvalue(), table.file.getvalue()


def test_every_row_is_accounted_for(finished):
    run_dir, progress, _ = finished
    assert "pool: 24 rows in = 23 read + 1 quarantined" in progress
    assert "tokens: 23 rows = 22 usable + 1 quarantined" in progress
    quarantine = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [(q["reason"], q["line"]) for q in quarantine] == [("empty-completion", 23), ("over-long", 24)]
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["pool"]["rows_in"] == manifest["pool"]["usable"] + manifest["pool"]["quarantined"] == 24


def test_scores_explain_themselves(finished):
    run_dir, _, _ = finished
    davir = pq.read_table(run_dir / "scores/davir.parquet").to_pydict()
    ini, ref = np.array(davir["loss_ini"]), np.array(davir["loss_ref"])
    assert np.allclose(davir["score"], (ini - ref) / ini)
    assert sum(davir["selected"]) == int(22 * 0.25)
    best = sorted(range(22), key=lambda i: -davir["score"][i])
    assert [davir["rank"][i] for i in best] == list(range(1, 23))
    rose = pq.read_table(run_dir / "scores/rose.parquet").to_pydict()
    assert np.allclose(rose["score"], np.maximum(rose["task.a"], rose["task.b"]))
    assert {"ckpt0.norm", "ckpt1.norm", "ckpt0.momentum", "ckpt1.lr"} <= set(rose)


def test_subset_is_the_input_rows_unchanged(finished, data):
    run_dir, _, _ = finished
    lines = Path(data["pool"]).read_text().splitlines()
    chosen = (run_dir / "subsets/davir.jsonl").read_text().splitlines()
    assert len(chosen) == 5 and set(chosen) <= set(lines)


def test_the_folder_loads_as_a_dataset(finished, tmp_path):
    from datasets import load_dataset

    run_dir, _, _ = finished
    rows = load_dataset(str(run_dir), cache_dir=str(tmp_path))["train"]
    assert rows.num_rows == 5 and rows.column_names == ["instruction", "input", "output"]
    scores = load_dataset(str(run_dir), "scores", cache_dir=str(tmp_path))["train"]
    assert scores.num_rows == 22 and "score" in scores.column_names


def test_compare_alone_keeps_the_tables_order_and_numbers(finished):
    run_dir, _, table = finished
    before = (run_dir / "comparison.json").read_bytes()
    made = load_recipe(run_dir / "recipe.yaml").model_copy(update={"run_dir": str(run_dir)})
    job = Job(made, console=quiet())
    again = compare(job, evaluated_cells(job))
    assert (run_dir / "comparison.json").read_bytes() == before
    assert [e.label for e in again.summary] == ["base", "rose", "less", "davir", "random", "longest", "full"]


def test_comparison_holds_methods_against_random(finished):
    run_dir, _, table = finished
    comparison = json.loads((run_dir / "comparison.json").read_text())
    labels = [entry["label"] for entry in comparison["summary"]]
    assert labels == ["base", "rose", "less", "davir", "random", "longest", "full"]
    random = comparison["summary"][labels.index("random")]
    assert random["seeds"] == 2 and random["metrics"]["loss.chosen"]["spread"] > 0
    rose = comparison["summary"][labels.index("rose")]
    test = rose["vs_random"]["accuracy.policy_mean"]
    assert test["low"] <= test["difference"] <= test["high"] and 0 <= test["p"] <= test["p_holm"] <= 1
    assert rose["cost"]["select_flops"] > 0 and rose["n_rows"] == 5
    base = comparison["summary"][0]
    assert base["metrics"]["margin.implicit_sum"]["value"] == 0
    for word in ("rose", "random x2", "full", "base"):
        assert word in table


def test_the_table_leads_with_the_headline_and_says_what_can_be_seen(finished):
    """By the preference loss (six pairs are too few of like length), from the items on disk."""
    run_dir, _, table = finished
    comparison = json.loads((run_dir / "comparison.json").read_text())
    assert comparison["headline"] == "loss.preference" and next(iter(comparison["pareto"])) == "loss.preference"
    assert "preference" in next(line for line in table.splitlines() if line.split())
    arrays = {p.parent.name: load_file(p) for p in run_dir.glob("evaluation/*/items.safetensors")}
    base = arrays.pop("base")

    def losses(name):
        gain = {s: arrays[name][f"pair.{s}"] - base[f"pair.{s}"] for s in ("chosen", "rejected")}
        return np.log1p(np.exp(-0.1 * (gain["chosen"] - gain["rejected"])))

    random = (losses("random-0-seed0") + losses("random-1-seed0")) / 2
    rose = next(e for e in comparison["summary"] if e["label"] == "rose")["vs_random"]
    assert next(iter(rose)) == "loss.preference"
    assert rose["loss.preference"]["difference"] == pytest.approx((losses("rose-seed0") - random).mean())
    spreads = [
        (losses(n) - random).var(ddof=1) for n in sorted(arrays) if not n.startswith("random") and n != "full-seed0"
    ]
    power = comparison["power"]["loss.preference"]
    assert power["sd"] == pytest.approx(np.sqrt(np.mean(spreads))) and power["n"] == 6
    assert power["smallest"] == pytest.approx(2.80159 * power["sd"] / np.sqrt(6), rel=1e-5)
    assert comparison["power"]["accuracy.policy_mean"]["smallest"] is None  # six right or wrong answers show nothing
    assert "seen 4 in 5" in table


def test_a_second_run_does_nothing_again(finished, model_folder, data):
    run_dir, _, first = finished
    before = {p: p.read_bytes() for p in run_dir.rglob("*.safetensors")}
    costs = (run_dir / "costs.jsonl").read_text()
    progress, table = quiet(), quiet()
    run_recipe(recipe(model_folder, data, run_dir), console=progress, out=table)
    assert {p: p.read_bytes() for p in run_dir.rglob("*.safetensors")} == before
    assert (run_dir / "costs.jsonl").read_text() == costs
    assert table.file.getvalue() == first
    assert "scored before, kept" in progress.file.getvalue() and "trained before, kept" in progress.file.getvalue()


def test_another_recipe_is_refused(finished, model_folder, data):
    run_dir, _, _ = finished
    with pytest.raises(PlanMismatch, match="train.learning_rate: 0.001 -> 0.01"):
        run_recipe(recipe(model_folder, data, run_dir, train={**TRAIN, "learning_rate": 0.01}), console=quiet())


def test_a_fresh_run_gives_the_same_bytes(finished, model_folder, data, tmp_path):
    run_dir, _, _ = finished
    job = Job(recipe(model_folder, data, tmp_path), console=quiet())
    for name in ("davir", "less", "rose"):
        fresh = score(job, MethodSpec(name=name))
        old = pq.read_table(run_dir / f"scores/{name}.parquet")
        assert fresh["score"].equals(old["score"]) and fresh["id"].equals(old["id"])


def test_permuting_the_pool_permutes_the_scores(finished, model_folder, data, tmp_path):
    run_dir, _, _ = finished
    lines = Path(data["pool"]).read_text().splitlines(keepends=True)
    shuffled = tmp_path / "pool.jsonl"
    shuffled.write_text("".join(lines[::-1]))
    job = Job(
        recipe(model_folder, {**data, "pool": str(shuffled)}, tmp_path / "run"),
        console=quiet(),
    )
    for name in ("davir", "less"):
        fresh = score(job, MethodSpec(name=name))
        old = pq.read_table(run_dir / f"scores/{name}.parquet")
        new = dict(zip(fresh["id"].to_pylist(), fresh["score"].to_pylist(), strict=True))
        assert new == dict(zip(old["id"].to_pylist(), old["score"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_scores_the_pool(name, finished, model_folder, data):
    run_dir, _, _ = finished
    job = Job(recipe(model_folder, data, run_dir), console=quiet())
    options = {"permutations": 4} if name == "tmc-shapley" else {}  # each set of rows is a training
    table = score(job, MethodSpec(name=name, label=f"all-{name}", options=options))
    values = np.array(table["score"].to_pylist(), dtype=float)
    assert len(values) == 22 and np.isfinite(values).all() and len(set(values)) > 1
    subset = choose(job, f"all-{name}", "50%")
    assert subset.n_rows == 11


def test_crossfit_scores_each_row_by_a_reference_that_never_saw_it(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["davir"], reference={**TRAIN, "folds": 2})
    job = Job(made, console=quiet())
    table = score(job, MethodSpec(name="davir"))
    assert np.isfinite(np.array(table["score"].to_pylist())).all()
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"reference-fold0", "reference-fold1"}


def test_a_full_reference_is_scored_as_a_second_model(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["davir"], reference={**TRAIN, "full": True})
    table = score(Job(made, console=quiet()), MethodSpec(name="davir"))
    parts = table.to_pydict()
    assert np.isfinite(parts["score"]).all() and parts["loss_ref"] != parts["loss_ini"]
    assert (tmp_path / "models/reference/model.safetensors").exists()


def test_an_existing_reference_can_be_named(finished, model_folder, data, tmp_path):
    run_dir, _, _ = finished
    made = recipe(
        model_folder, data, tmp_path, methods=["davir"], reference={"path": str(run_dir / "models/reference")}
    )
    table = score(Job(made, console=quiet()), MethodSpec(name="davir"))
    assert table["score"].equals(pq.read_table(run_dir / "scores/davir.parquet")["score"])


def test_mixes_take_each_pool_by_its_own_method(model_folder, data, tmp_path):
    pools = [{"path": data["pool"], "name": "chat"}, {"path": data["rows"], "name": "maths"}]
    mix = [{"label": "mixed", "parts": [{"source": "chat", "method": "davir", "budget": 3}, {"source": "maths"}]}]
    made = recipe(model_folder, data, tmp_path, pool=pools, methods=["davir"], mix=mix, controls={"random_seeds": []})
    run_recipe(made, console=quiet(), out=quiet())
    entry = json.loads((tmp_path / "subsets.json").read_text())["mixed"]
    assert entry["n_rows"] == 3 + 4
    labels = [e["label"] for e in json.loads((tmp_path / "comparison.json").read_text())["summary"]]
    assert "mixed" in labels


def test_several_budgets_are_several_subsets(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["length"], budget=[2, "50%"], evaluate={})
    run_recipe(made, console=quiet(), out=quiet())
    index = json.loads((tmp_path / "subsets.json").read_text())
    assert index["length@2"]["n_rows"] == 2 and index["length@50%"]["n_rows"] == 11


def test_findings_are_stored(finished):
    run_dir, _, _ = finished
    names = {f["name"] for f in json.loads((run_dir / "findings.json").read_text())}
    assert {"length-correlation", "reference-gain", "length-before-after", "shared-momentum"} <= names


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ["roze"]}, RecipeError, "no method 'roze' \\(did you mean 'rose'"),
        ({"methods": [{"name": "rose", "options": {"reduce": "min"}}]}, RecipeError, "reduce is one of max, mean"),
        ({"methods": [{"name": "rose", "options": {"redcue": "max"}}]}, RecipeError, "did you mean 'reduce'"),
        ({"methods": [{"name": "rose", "options": {"beta": "x"}}]}, RecipeError, "beta must be"),
        ({"target": []}, RecipeError, "needs validation rows or pairs"),
        ({"model": {"model_name_or_path": "MODEL", "max_length": 8}}, DataError, "no row of the pool is usable"),
    ],
)
def test_mistakes_are_told_in_one_line(change, error, message, model_folder, data, tmp_path):
    if "model" in change:
        change["model"]["model_name_or_path"] = str(model_folder)
    with pytest.raises(error, match=message) as caught:
        run_recipe(recipe(model_folder, data, tmp_path, **change), console=quiet(), out=quiet())
    assert "\n" not in str(caught.value)


def test_rose_refuses_a_target_without_pairs(model_folder, data, tmp_path):
    with pytest.raises(RecipeError, match="rose needs pairs"):
        run_recipe(recipe(model_folder, data, tmp_path, target=data["rows"], methods=["rose"]), console=quiet())


def test_strict_stops_at_the_first_bad_row(model_folder, data, tmp_path):
    with pytest.raises(DataError, match=r"pool.jsonl:23: .*empty-completion"):
        run_recipe(recipe(model_folder, data, tmp_path, strict=True), console=quiet())


def test_a_nan_score_never_ranks(finished, model_folder, data, monkeypatch):
    from keepset.methods import random_ as scoring

    run_dir, _, _ = finished
    job = Job(recipe(model_folder, data, run_dir), console=quiet())

    def broken(ids, seed=0):
        values = np.linspace(0, 1, len(ids))
        values[3], values[5] = np.nan, np.inf
        return values

    monkeypatch.setattr(scoring, "random_", broken)
    table = score(job, MethodSpec(name="random", label="broken")).to_pydict()
    assert [r for r in table["reason"] if r] == ["nan-score", "infinite-score"]
    assert table["score"][3] is None and table["rank"][3] is None
    assert choose(job, "broken", "100%").n_rows == 20


def test_a_warm_up_of_one_step_still_scores(model_folder, data, tmp_path):
    warmup = {**TRAIN, "fraction": 0.1, "min_rows": 2, "num_train_epochs": 1}
    console = quiet()
    table = score(Job(recipe(model_folder, data, tmp_path, warmup=warmup), console=console), MethodSpec(name="rose"))
    assert np.isfinite(np.array(table["score"].to_pylist())).all()
    assert "its checkpoints count alike" in console.file.getvalue()


def test_other_held_out_rows_order_or_names_are_evaluated_anew(model_folder, data, tmp_path, monkeypatch):
    """The items of two models are paired by place; by content alone a reordered file would pair others' rows."""
    from keepset.pipeline import learn as finals
    from keepset.stages.job import Job

    measured = []

    def measure(job, learner, weights):
        measured.append(1)
        n = [len(learner.eval_pairs[0]), len(learner.eval_rows[0])]
        pairs = {k: np.ones(n[0]) for k in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
        return Items(pairs, rows={"nll": np.ones(n[1]), "n_tokens": np.ones(n[1])}), None

    monkeypatch.setattr(finals, "measure", measure)
    monkeypatch.setattr(finals, "summarise", lambda *a: {})
    files = {k: tmp_path / f"{k}.jsonl" for k in ("pairs", "rows")}
    lines = {k: Path(data[k]).read_text().splitlines() for k in files}
    asked = tmp_path / "asked.jsonl"

    def evaluated(**more):
        evaluate = {"pairs": [{"path": str(files["pairs"])}], "heldout": [{"path": str(files["rows"])}],
                    "gsm8k": {"path": str(asked)}, **more}  # fmt: skip
        job = Job(recipe(model_folder, data, tmp_path / "run", evaluate=evaluate), console=quiet(), force=True)
        measured.clear()
        finals.evaluate_final(job, finals.Learner(job), "base", None, None)
        return bool(measured)

    write = {k: lambda rows, k=k: files[k].write_text("\n".join(rows) + "\n") for k in files}
    for k in files:
        write[k](lines[k])
    asked.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert evaluated() and not evaluated()
    for k in files:
        write[k](lines[k][::-1])
        assert evaluated() and not evaluated()
        write[k](lines[k][:-1])
        assert evaluated() and not evaluated()
    assert evaluated(heldout=[{"path": str(files["rows"]), "name": "other"}])
    assert evaluated() and not evaluated()
    asked.write_text('{"question": "1+2?", "answer": "#### 3"}\n')
    assert evaluated() and not evaluated()


def test_the_shortest_rows_are_a_control_that_is_priced_and_compared(model_folder, data, tmp_path):
    controls = {"random_seeds": [0], "longest": True, "shortest": True}
    made = recipe(model_folder, data, tmp_path, methods=["length"], controls=controls)
    job = run_recipe(made, console=quiet(), out=quiet())
    chosen = {name: entry["n_tokens"] for name, entry in job.run.load_json("subsets.json").items()}
    assert chosen["shortest"] < chosen["random-0"] < chosen["longest"] == chosen["length"]
    entries = {e["label"]: e for e in job.run.load_json("comparison.json")["summary"]}
    assert entries["shortest"]["kind"] == "shortest" and entries["shortest"]["vs_random"]
    with pytest.raises(RecipeError, match="'shortest' is a control's name"):
        recipe(model_folder, data, tmp_path, methods=[{"name": "length", "label": "shortest"}], controls=controls)
    recipe(model_folder, data, tmp_path, methods=[{"name": "length", "label": "shortest"}])
