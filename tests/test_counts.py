"""The counts that plan and prices rest on, against what a run really logs."""

from __future__ import annotations

import re

import pytest

from keepset.counts import selection_work
from keepset.job import Job
from keepset.recipe import MethodSpec
from keepset.scoring import METHODS, needs_model, score
from test_pipeline import data, model_folder, quiet, recipe  # noqa: F401 - fixtures

MODEL_METHODS = [name for name in METHODS if needs_model(name)]


@pytest.mark.parametrize("folds", [0, 2])
def test_counted_operations_are_those_of_the_log(folds, model_folder, data, tmp_path):  # noqa: F811
    few = {"name": "tmc-shapley", "options": {"permutations": 4}}  # each set of rows is a training
    content = {"name": "davir", "label": "davir-content", "options": {"end_of_turn": False}}
    names = [few if n == "tmc-shapley" else n for n in [*MODEL_METHODS, content]] if not folds else ["davir"]
    reference = {"num_train_epochs": 1, "folds": folds}
    job = Job(recipe(model_folder, data, tmp_path, methods=names, reference=reference), console=quiet())
    work = {w.stage: w for w in selection_work(job, job.recipe.methods)}
    for spec in job.recipe.methods:
        score(job, spec)
    counted = sum(w.flops for w in work.values() if w.logged)
    costs = [e for e in job.run.costs() if "flops" in e]
    logged = [e for e in costs if any(re.fullmatch(w.logged, e["stage"]) for w in work.values() if w.logged)]
    assert costs == logged
    assert counted == pytest.approx(sum(e["flops"] for e in logged), rel=1e-9)
    assert sum(w.tokens for w in work.values() if w.logged) == pytest.approx(
        sum(e["tokens"] for e in logged), abs=len(logged)
    )


def test_a_method_alone_pays_for_its_own_stages_only(model_folder, data, tmp_path):  # noqa: F811
    job = Job(recipe(model_folder, data, tmp_path, methods=["davir", "ifd", "rose"]), console=quiet())
    stages = {
        name: [w.stage for w in selection_work(job, [MethodSpec(name=name)])] for name in ("davir", "ifd", "bm25")
    }
    assert stages["davir"] == ["losses under the base", "train the reference", "losses under the reference"]
    assert stages["ifd"] == ["losses under the base", "losses of answers alone"]
    assert stages["bm25"] == []
    rose = selection_work(job, [MethodSpec(name="rose")])
    less = selection_work(job, [MethodSpec(name="less")])
    target = [next(w for w in work if w.stage.startswith("target gradients")) for work in (rose, less)]
    assert target[0].rows == 2 * target[1].rows  # both sides of every pair against the chosen ones


def test_a_resumed_run_has_the_same_price(model_folder, data, tmp_path):  # noqa: F811
    made = recipe(model_folder, data, tmp_path, methods=["perplexity"])
    job = Job(made, console=quiet())
    score(job, made.methods[0])
    before = [w.flops for w in selection_work(job, made.methods)]
    again = Job(made, console=quiet())
    (tmp_path / "costs.jsonl").write_text("")
    assert [w.flops for w in selection_work(again, made.methods)] == before
