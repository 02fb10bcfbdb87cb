"""`keepset plan`: every stage of a run has a line with its seconds; only what a recipe needs is probed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from keepset.evaluate.statistics import accuracy_power
from keepset.pipeline.plan import plan_recipe, print_plan
from tiny_recipe import quiet, recipe


@pytest.fixture(scope="module")
def planned(model_folder, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plan")
    made = recipe(model_folder, data, run_dir, methods=["bm25", "rose", "davir"])
    return plan_recipe(made, console=quiet()), run_dir


def test_every_stage_has_its_line(planned):
    plan, _ = planned
    names = [step["stage"] for step in plan["steps"]]
    assert names[:3] == ["start, load the model", "read and tokenise", "score by bm25"]
    assert {"losses under the base", "train the reference", "warm-up", "gradients (adam) x2"} <= set(names)
    assert names[-1] == "select, compare, report" and names[-2].startswith("evaluate ")
    assert all(step["seconds"] > 0 for step in plan["steps"])
    assert plan["total_seconds"] == pytest.approx(sum(s["seconds"] for s in plan["steps"]), abs=0.06)
    assert set(plan["rates_gflops"]) == {"forward", "backward", "train"}
    assert set(plan["gpus"]) == {"RTX 4090", "A100 80GB", "H100 SXM"}


def test_every_training_pays_for_its_start(planned):
    plan, _ = planned
    trained = {s["stage"]: s for s in plan["steps"] if s["stage"].startswith(("train", "warm-up"))}
    many = next(s for name, s in trained.items() if name.endswith("models on 25%"))
    assert many["stage"] == "train 5 models on 25%"  # three methods and two draws of Random
    assert many["seconds"] > 3 * trained["warm-up"]["seconds"]


def test_nothing_is_scored_or_trained_in_the_run_folder(planned):
    _, run_dir = planned
    assert not (run_dir / "scores").exists() and not (run_dir / "models").exists()


def test_a_text_recipe_probes_no_model(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["bm25", "dsir"], evaluate={})
    plan = plan_recipe(made, console=quiet())
    assert plan["rates_gflops"] == {} and plan["total_flops"] == 0
    assert [s["stage"] for s in plan["steps"]][2:4] == ["score by bm25", "score by dsir"]
    console = Console(file=io.StringIO(), width=160)
    print_plan(plan, console)
    assert "held-out" not in console.file.getvalue()
    assert "GPU" not in console.file.getvalue() and "estimate" not in console.file.getvalue()


def test_the_printed_form(planned):
    console = Console(file=io.StringIO(), width=160)
    print_plan(planned[0], console)
    text = console.file.getvalue()
    assert "in all about" in text and "probe, GFLOP/s: forward" in text and "estimate, not measured" in text
    assert "cheaper: warmup.checkpoints: last saves" in text
    assert planned[0]["heldout_pairs"] == 6 and "6 held-out pairs: too few to tell two models apart" in text


def test_what_the_held_out_pairs_can_tell(planned):
    console = Console(file=io.StringIO(), width=300)
    print_plan({**planned[0], "heldout_pairs": 36, "accuracy_seen": accuracy_power(36)}, console)
    assert (
        "36 held-out pairs: four of five comparisons tell accuracies apart that differ by 0.218 at best, by 0.330"
        in (console.file.getvalue())
    )
