"""Influence functions, in-run and Monte-Carlo Shapley from a recipe: shared passes, resume, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

from keepset.errors import RecipeError
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec
from keepset.stages import shapley as stages_shapley
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe


def made(model_folder, data, folder, methods, **more):
    return Job(recipe(model_folder, data, folder, methods=methods, **more), console=quiet())


def scores_of(job, spec):
    return score(job, spec)["score"].to_numpy()


def test_influence_functions_share_tracins_pass_and_change_its_ranking(model_folder, data, tmp_path):
    names = [
        "tracin",
        "influence",
        "datainf",
        "ekfac",
        {"name": "ekfac", "label": "each", "options": {"damping_by": "matrix"}},
    ]
    job = made(model_folder, data, tmp_path, names)
    found = {spec.label: scores_of(job, spec) for spec in job.recipe.methods}
    assert all(np.isfinite(s).all() for s in found.values())
    passes = [e["stage"] for e in job.run.costs() if e["stage"].startswith("gradients at")]
    assert len(passes) == len(set(passes))  # one a checkpoint, for all of them
    ranks = {label: tuple(np.argsort(s)) for label, s in found.items()}
    assert len(set(ranks.values())) == len(ranks)
    table = job.run.load_table("scores/ekfac.parquet")
    assert sum(name.endswith(".norm") for name in table.column_names) == 1  # the last checkpoint alone


def test_in_run_shapley_is_the_same_after_a_kill(model_folder, data, tmp_path, monkeypatch):
    options = {"batch_size": 8, "learning_rate": 0.05}
    first, second = (
        {"name": "in-run-shapley", "label": order, "options": {**options, "order": order}}
        for order in ("first", "second")
    )
    whole = made(model_folder, data, tmp_path / "a", [first, second])
    want = {spec.label: scores_of(whole, spec) for spec in whole.recipe.methods}
    assert np.corrcoef(want["first"], want["second"])[0, 1] > 0.9 and (want["first"] != want["second"]).all()

    killed = made(model_folder, data, tmp_path / "b", [first])
    replace, written = os.replace, []

    def dies(source, path):
        replace(source, path)
        written.append(Path(path).name)
        if written.count("state.safetensors") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as until_killed, pytest.raises(KeyboardInterrupt):
        until_killed.setattr(os, "replace", dies)
        score(killed, killed.recipe.methods[0])
    again = made(model_folder, data, tmp_path / "b", [first])
    np.testing.assert_array_equal(scores_of(again, again.recipe.methods[0]), want["first"])
    (state,) = (tmp_path / "b" / "models").glob("in-run-*/state.safetensors")
    state.write_bytes(state.read_bytes()[:100])  # a torn state is no state
    torn = made(model_folder, data, tmp_path / "b", [first])
    torn.run.path.joinpath("scores/first.parquet").unlink()
    np.testing.assert_array_equal(scores_of(torn, torn.recipe.methods[0]), want["first"])


def test_monte_carlo_shapley_trains_each_set_once(model_folder, data, tmp_path, monkeypatch):
    lines = Path(data["pool"]).read_text().splitlines(keepends=True)
    for k in range(3):
        (tmp_path / f"part{k}.jsonl").write_text("".join(lines[7 * k : 7 * k + 7]))
    pool = [{"path": str(tmp_path / f"part{k}.jsonl")} for k in range(3)]
    by_source = {"name": "tmc-shapley", "options": {"players": "source", "permutations": 4, "rows_per_player": 3}}
    job = made(model_folder, data, tmp_path / "run", [by_source], pool=pool)
    spec = job.recipe.methods[0]
    values = scores_of(job, spec)
    (path,) = (tmp_path / "run" / "work").glob("retraining-*.json")
    known = json.loads(path.read_text())
    assert {"", "0 1 2"} < set(known) and len(known) <= 8
    assert values.sum() == pytest.approx(known["0 1 2"] - known[""])
    assert len(np.unique(values)) == 3  # a source's rows share its value
    path.write_text(json.dumps({k: v for k, v in known.items() if k != "0 1 2"}))  # edited by hand: trained again
    again = made(model_folder, data, tmp_path / "run", [by_source], pool=pool)
    np.testing.assert_array_equal(scores_of(again, spec), values)
    assert json.loads(path.read_text()) == known

    monkeypatch.setattr(stages_shapley, "MOST_PLAYERS", 3)
    with pytest.raises(RecipeError, match=r"21 players \(row\).*up to 420 models.*players: source"):
        score(job, MethodSpec(name="tmc-shapley"))


def test_unit_rows_are_the_values_over_the_norm_at_the_row_s_step(model_folder, data, tmp_path):
    from keepset.stages.shapley import InRun

    options = {"batch_size": 100, "learning_rate": 0.05}  # one step: one norm a row
    plain = {"name": "in-run-shapley", "label": "plain", "options": options}
    unit = {"name": "in-run-shapley", "label": "unit", "options": {**options, "unit_norm": True}}
    job = made(model_folder, data, tmp_path, [plain, unit])
    values, units = (scores_of(job, spec) for spec in job.recipe.methods)
    norms = values / units
    assert (norms > 0).all() and norms.std() > 0
    gradients = score(job, MethodSpec(name="grad-norm"))["ckpt1.norm"].to_numpy()
    np.testing.assert_allclose(norms, gradients, rtol=1e-3)
    old = InRun(False, 0.05, 100, 1, 0)
    assert "unit_norm" not in old._key(job)["run"]  # folders of before are found again
