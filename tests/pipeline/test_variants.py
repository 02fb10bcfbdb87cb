"""Variants of a scoring, agreement across run folders, the reference on rows it never saw, shares."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from keepset.cli import app
from keepset.errors import PlanMismatch, RecipeError
from keepset.keys import set_key
from keepset.pipeline import run_recipe
from keepset.pipeline.findings import diagnose_comparison, diagnose_shares
from keepset.pipeline.reference_check import held_out_finding
from keepset.recipe import parse_recipe
from keepset.runfolder.records import Comparison, Cost, Entry, Links, SelectionCost, Versus
from keepset.runfolder.run import Run
from keepset.stages.job import Job
from keepset.stages.rows import rows_outside
from tiny_recipe import TRAIN, quiet, recipe
from tolerance import FORWARD

FAST = {"target": [], "methods": ["davir", "loss"], "budget": ["10%", "25%"], "evaluate": {}}
CONTROLS = {"random_seeds": [0], "longest": False, "base": False}


@pytest.mark.parametrize("pool", ["a", ["a"], [{"path": "a"}]])
def test_a_key_reaches_what_stands_in_a_short_form(pool):
    keys = {"pool": pool, "methods": ["davir"]}
    set_key(keys, "pool.0.limit", 5)
    set_key(keys, "methods.0.label", "d")
    assert keys == {"pool": [{"path": "a", "limit": 5}], "methods": [{"name": "davir", "label": "d"}]}
    set_key(keys, "pool.0", "b")
    assert keys["pool"] == ["b"]
    with pytest.raises(RecipeError, match="from 0 to 0"):
        set_key(keys, "pool.1.limit", 5)


def test_a_key_may_lead_through_a_list():
    keys = {"pool": [{"path": "a"}, {"path": "b"}]}
    set_key(keys, "pool.1.limit", 5)
    set_key(keys, "lora.lora_r", 4)
    assert keys == {"pool": [{"path": "a"}, {"path": "b", "limit": 5}], "lora": {"lora_r": 4}}
    for key in ("pool.2.limit", "pool.x.limit", "pool.0.path.more"):
        with pytest.raises(RecipeError, match="key"):
            set_key(keys, key, 1)


@pytest.fixture(scope="module")
def finished(model_folder, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("variants")
    variants = [
        {"label": "seed-1", "set": {"seed": 1}},
        {"label": "crossfit", "set": {"reference.folds": 2}},
        {"label": "half", "set": {"pool.0.limit": 12}},
        {"label": "mmr", "set": {"select.policy": "mmr"}},
    ]
    made = recipe(model_folder, data, run_dir, **FAST, controls=CONTROLS, variants=variants)
    out = quiet()
    run_recipe(made, console=quiet(), out=out)
    return run_dir, made, out.file.getvalue()


def test_variants_are_scored_and_compared(finished):
    run_dir, _, printed = finished
    found = json.loads((run_dir / "overlap.json").read_text())
    assert list(found) == ["davir", "loss"]
    assert list(found["davir"]["scorings"]) == ["recipe", "seed-1", "crossfit", "half", "mmr"]
    assert found["davir"]["n"] == 12 and len(found["davir"]["pairs"]) == 10
    same = {(p["a"], p["b"]): p for p in found["loss"]["pairs"]}
    assert same["recipe", "seed-1"]["spearman"] == pytest.approx(1)  # the base's loss has no seed
    assert same["recipe", "seed-1"]["overlap"] == {"10%": 1.0, "25%": 1.0}
    assert "two random rankings" in printed and "recipe / crossfit" in printed


def test_a_variant_takes_the_base_s_losses_from_the_recipe_s_folder(finished):
    run_dir, _, _ = finished

    def stages(folder):
        return [entry["stage"] for entry in Run(folder).costs()]

    assert not [s for s in stages(run_dir / "variants/crossfit") if s.startswith("losses (base")]
    own = next(e for e in Run(run_dir).costs() if e["stage"] == "losses (base and reference)")
    lent = next(e for e in Run(run_dir / "variants/seed-1").costs() if e["stage"] == "losses (reference)")
    assert lent["tokens"] * 2 == own["tokens"]  # the reference's pass alone


def test_a_variant_that_only_selects_otherwise_trains_and_scores_nothing(finished):
    run_dir, _, _ = finished
    stages = [entry["stage"] for entry in Run(run_dir / "variants/mmr").costs()]
    assert not [s for s in stages if s.startswith(("train", "losses"))]
    Run(run_dir / "variants/mmr").require_whole("models/reference")
    tables = [Run(f).load_table("scores/davir.parquet")["score"] for f in (run_dir, run_dir / "variants/mmr")]
    assert tables[0].equals(tables[1])


def test_a_run_tells_what_choosing_cost_beside_one_training_on_the_full_pool(finished):
    run_dir, _, _ = finished
    found = json.loads((run_dir / "comparison.json").read_text())
    cost = found["selection"]
    assert [s["stage"] for s in cost["stages"]] == [
        "losses under the base", "train the reference", "losses under the reference"]  # fmt: skip
    assert cost["flops"] == sum(s["flops"] for s in cost["stages"])
    assert cost["share"] == pytest.approx(cost["flops"] / found["full_training_flops"]) == pytest.approx(2)
    assert 0 < cost["seconds"] <= sum(e["seconds"] for e in Run(run_dir).costs())
    assert json.loads((run_dir / "manifest.json").read_text())["selection_cost"] == cost


def test_variants_may_be_added_later_and_wrong_ones_are_refused(finished, tmp_path):
    run_dir, made, _ = finished
    more = made.model_copy(update={"variants": []})
    Job(more, console=quiet())  # the folder takes it
    with pytest.raises(PlanMismatch):
        Job(made.model_copy(update={"seed": 5}), console=quiet())
    Job(made, console=quiet())
    bad = {**made.model_dump(mode="json"), "variants": [{"label": "x", "set": {"reference.fold": 2}}]}
    with pytest.raises(RecipeError, match=r"variants.x: unknown key 'reference.fold'.*folds"):
        parse_recipe(bad)
    with pytest.raises(RecipeError, match=r"variants.x: unknown key 'reference.fold'.*folds"):  # from a run folder
        run_recipe(parse_recipe({**bad, "run_dir": str(tmp_path / "bad")}, stored=True), console=quiet(), out=quiet())


def test_overlap_on_the_command_line(finished):
    run_dir, _, _ = finished
    places = [str(run_dir), f"{run_dir}/variants/crossfit:davir"]
    result = CliRunner().invoke(app, ["overlap", *places, "--budget", "20%", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sizes"] == {"20%": 4}
    shown = CliRunner().invoke(app, ["overlap", *places])
    assert "overlap of the top" in shown.stdout


def test_a_cross_fitted_scoring_tells_the_reference_s_gain_on_held_out_rows(finished):
    run_dir, _, _ = finished
    found = {f["name"]: f for f in json.loads((run_dir / "variants/crossfit/findings.json").read_text())}
    assert "reference-held-out" in found and "reference-gain" not in found
    scores = Run(run_dir / "variants/crossfit").load_table("scores/davir.parquet").to_pydict()
    drop = (np.sum(scores["loss_ini"]) - np.sum(scores["loss_ref"])) / np.sum(scores["n_tokens"])
    assert found["reference-held-out"]["figure"] == pytest.approx(drop, abs=1e-3)
    plain = {f["name"]: f for f in json.loads((run_dir / "findings.json").read_text())}
    assert plain["reference-held-out"]["figure"] is None  # no evaluation rows
    assert "reference-gain" in plain


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_reference_is_held_against_the_base_on_the_evaluation_s_rows(model_folder, data, tmp_path, full):
    evaluate = {"pairs": [{"path": data["pairs"]}], "heldout": [{"path": data["rows"]}], "bootstrap": 100}
    made = recipe(model_folder, data, tmp_path, **{**FAST, "methods": ["davir"], "evaluate": evaluate},
                  controls=CONTROLS, reference={**TRAIN, "full": full})  # fmt: skip
    job = run_recipe(made, console=quiet(), out=quiet())
    found = {f["name"]: f for f in job.run.load_json("findings.json")}["reference-held-out"]
    assert "10 held-out rows" in found["text"]  # 6 pairs' chosen sides and 4 rows
    from keepset.pipeline.learn import Learner
    from keepset.pipeline.reference_check import held_out_losses

    learner = Learner(job)
    rows = [*learner.eval_rows[0], *(c for c, _ in learner.eval_pairs[0])]
    ini, ref, n_tokens = held_out_losses(job, rows_outside(rows))
    assert found["figure"] == pytest.approx((ini - ref).sum() / n_tokens.sum(), abs=1e-3)
    assert ini.shape == (10,) and np.abs(ini - ref).max() > 0
    names = rows_outside([rows[0], rows[0]]).ids
    assert names[0] != names[1]


def test_a_reference_that_is_no_better_is_a_warning():
    n_tokens = np.full(40, 10)
    ini = np.full(40, 20.0) + np.linspace(0, 1, 40)
    better = held_out_finding(ini, ini - 1, n_tokens, "40 rows")
    worse = held_out_finding(ini, ini + 1, n_tokens, "40 rows")
    assert (better.level, better.figure) == ("info", 0.1)
    assert (worse.level, worse.figure) == ("warning", -0.1)
    assert "reference.folds" in worse.advice


def test_shares_by_source_and_category_and_the_kept_length():
    scores = pa.table({"id": list("abcd"), "source": ["x", "x", "x", "y"], "category": ["p", "q", None, "p"],
                       "n_tokens": [2, 4, 6, 8], "selected": [True, True, False, False]})  # fmt: skip
    found = {f.name: f for f in diagnose_shares(scores, "davir")}
    assert found["source-shares"].text == "sources before -> after: x 75% -> 100%, y 25% -> 0%"
    assert found["source-shares"].level == "warning" and "none of y" in found["source-shares"].advice
    assert "p 50% -> 50%, q 25% -> 50%, – 25% -> 0%" in found["category-shares"].text
    assert found["kept-length"].text == "mean answer before -> after: 5.0 -> 3.0 tokens"
    assert found["kept-length"].level == "info"
    shortest = {f.name: f for f in diagnose_shares(scores, "davir", np.array(["a"]))}["kept-length"]
    assert (shortest.level, shortest.figure) == ("warning", 2.0)
    assert diagnose_shares(scores, "davir", np.array(["d"]))[0].figure == 1.0


@pytest.mark.parametrize(
    ("metric", "low", "high", "p", "name"),
    [("loss.heldout", -0.2, -0.1, 0.01, None), ("loss.heldout", 0.1, 0.2, 0.01, "worse-than-random"),
     ("accuracy.policy_mean", -0.2, -0.1, 0.01, "worse-than-random"),
     ("accuracy.policy_mean", 0.1, 0.2, 0.01, None), ("loss.heldout", -0.1, 0.2, 0.5, "no-better-than-random"),
     ("accuracy.policy_mean", -0.2, -0.1, 0.06, "no-better-than-random")],  # told apart alone, not among the others
)  # fmt: skip
def test_a_comparison_s_findings_know_which_side_is_better(metric, low, high, p, name):
    versus = Versus((low + high) / 2, low, high, p=0.01, n=9, win_tie_loss=(3, 3, 3), p_holm=p)
    entry = Entry("davir", "method", "5%", 9, 99, 1, {}, {metric: versus}, Cost(0, 0, 0, 0))
    selection = SelectionCost(0, 0, 0, None, ())
    found = diagnose_comparison(Comparison((), (entry,), 0, selection, {}, Links((), ())))
    assert [f.name for f in found] == ([name] if name else [])


def test_a_mix_is_held_against_the_random_mix_on_both_sides(model_folder, data, tmp_path):
    pools = [{"path": data["pool"], "name": "chat"}, {"path": data["rows"], "name": "maths"}]
    heldout = [{"path": data["rows"], "name": "maths"}, {"path": data["pool"], "name": "chat", "limit": 5}]
    mix = [
        {"label": f"{method}+maths", "parts": [{"source": "chat", "method": method, "budget": 3}, {"source": "maths"}]}
        for method in ("davir", "random-0")
    ]
    evaluate = {"heldout": heldout, "bootstrap": 100}
    made = recipe(model_folder, data, tmp_path, **{**FAST, "methods": ["davir"], "evaluate": evaluate},
                  pool=pools, mix=mix, controls=CONTROLS)  # fmt: skip
    out = quiet()
    job = run_recipe(made, console=quiet(), out=out)
    summary = {e["label"]: e for e in job.run.load_json("comparison.json")["summary"]}
    metrics = summary["davir+maths"]["metrics"]
    both = (4 * metrics["loss.heldout.maths"]["value"] + 5 * metrics["loss.heldout.chat"]["value"]) / 9
    assert both == pytest.approx(metrics["loss.heldout"]["value"])
    versus = summary["davir+maths"]["vs_random"]
    difference = (
        metrics["loss.heldout.maths"]["value"] - summary["random-0+maths"]["metrics"]["loss.heldout.maths"]["value"]
    )
    assert versus["loss.heldout.maths"]["difference"] == pytest.approx(difference)
    assert not summary["random-0+maths"]["vs_random"]
    assert "maths" in out.file.getvalue()


def test_the_losses_of_a_row_s_tokens_add_up_to_the_scored_ones(model_folder, data, tmp_path):
    from keepset.report.explain_tokens import token_changes

    more = {**FAST, "methods": ["davir"], "controls": CONTROLS}
    for name, reference in (("plain", TRAIN), ("folds", {**TRAIN, "folds": 2})):
        made = recipe(model_folder, data, tmp_path / name, **more, reference=reference)
        job = run_recipe(made, console=quiet(), out=quiet())
        scores = job.run.load_table("scores/davir.parquet").to_pydict()
        facts = token_changes(job.run.path, scores["id"][3])
        assert len(facts["tokens"]) == scores["n_tokens"][3]
        assert facts["before"] == pytest.approx(scores["loss_ini"][3], rel=4 * FORWARD)
        assert facts["after"] == pytest.approx(scores["loss_ref"][3], rel=4 * FORWARD)
