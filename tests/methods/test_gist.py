"""GIST from dots alone against an explicit SVD of the target's gradients, and columns a target row on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from keepset.errors import RecipeError
from keepset.methods.gist import gist
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec
from keepset.stages import influence as stages
from keepset.stages.influence import InfluenceRequest, TargetGradients
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe
from tolerance import BACKWARD

TASKS = np.array([0, 0, 1, 1, 1])


def by_svd(rows, goals, tasks, k):
    """Project on the top k right singular vectors of the target's gradients; cosine with each task's mean."""
    v = np.linalg.svd(goals, full_matrices=False)[2][:k]
    coordinates, targets = rows @ v.T, goals @ v.T
    means = np.stack([targets[tasks == j].mean(axis=0) for j in np.unique(tasks)])
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    return unit(coordinates) @ unit(means).T


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_dots_give_what_an_svd_gives(rank):
    rng = np.random.default_rng(rank)
    rows, goals = rng.normal(size=(12, 40)), rng.normal(size=(5, 40)) * rng.gamma(2, 1, (5, 1))
    _, per_task = gist((rows @ goals.T)[None], (goals @ goals.T)[None], TASKS, rank=rank)
    np.testing.assert_allclose(per_task, by_svd(rows, goals, TASKS, rank), atol=1e-9)


def test_checkpoints_are_weighted_by_their_rates_and_tasks_reduced():
    rng = np.random.default_rng(0)
    rows, goals = rng.normal(size=(2, 12, 40)), rng.normal(size=(2, 5, 40))
    dots, gram = np.einsum("cnp,cmp->cnm", rows, goals), np.einsum("cmp,clp->cml", goals, goals)
    scores, per_task = gist(dots, gram, TASKS, np.array([3.0, 1.0]), reduce="mean")
    parts = [by_svd(rows[c], goals[c], TASKS, 2) for c in (0, 1)]
    np.testing.assert_allclose(per_task, 0.75 * parts[0] + 0.25 * parts[1], atol=1e-9)
    np.testing.assert_allclose(scores, per_task.mean(axis=1))


def test_directions_without_length_are_left_out_and_a_target_without_gradients_is_refused():
    rng = np.random.default_rng(0)
    rows, two = rng.normal(size=(6, 30)), rng.normal(size=(2, 30))
    goals = np.array([[1, 0], [0, 1], [1, 1], [2, 1], [1, -1]]) @ two  # of rank 2
    _, per_task = gist((rows @ goals.T)[None], (goals @ goals.T)[None], TASKS, rank=5)
    np.testing.assert_allclose(per_task, by_svd(rows, goals, TASKS, 2), atol=1e-6)
    with pytest.raises(ValueError, match="no row of the target has a gradient"):
        gist(np.zeros((1, 6, 5)), np.zeros((1, 5, 5)), TASKS)
    with pytest.raises(ValueError, match="don't fit 5 target rows"):
        gist(np.zeros((1, 6, 4)), np.zeros((1, 4, 4)), TASKS)


@pytest.fixture(scope="module")
def job(model_folder, data, tmp_path_factory):
    return Job(recipe(model_folder, data, tmp_path_factory.mktemp("run"), methods=["rose"]), console=quiet())


@pytest.mark.parametrize("name", ["rose", "less"])
def test_a_task_s_column_is_the_mean_of_its_rows_columns(job, name):
    by_task = score(job, MethodSpec(name=name))
    by_row = score(job, MethodSpec(name=name, label="rows", options={"per": "query"}))
    columns = [c for c in by_row.column_names if c.startswith("task.")]
    assert len(columns) == 6
    for task in ("a", "b"):
        rows = np.stack([by_row[c].to_numpy() for c in columns if c.startswith(f"task.{task}.")])
        np.testing.assert_allclose(rows.mean(axis=0), by_task[f"task.{task}"].to_numpy(), atol=BACKWARD)
    best = np.stack([by_row[c].to_numpy() for c in columns]).max(axis=0)
    np.testing.assert_array_equal(by_row["score"].to_numpy(), best)


@pytest.mark.parametrize("options", [{"per": "query"}, {"per": "query", "cosine": True}, {"cosine": True}])
def test_influence_functions_take_rows_and_norms(job, options):
    plain = score(job, MethodSpec(name="datainf"))
    table = score(job, MethodSpec(name="datainf", label="other", options=options))
    columns = [c for c in table.column_names if c.startswith("task.")]
    assert len(columns) == (6 if "per" in options else 2)
    if options == {"cosine": True}:
        divided = plain["task.a"].to_numpy() / plain["ckpt0.norm"].to_numpy()
        np.testing.assert_allclose(table["task.a"].to_numpy(), divided, rtol=1e-6)


def test_gist_in_a_run_is_the_formula_on_its_own_gradients(job):
    table = score(job, MethodSpec(name="gist", options={"rank": 3}))
    request = InfluenceRequest("sft", normalise="pair", per="query")
    goal = TargetGradients(request).value(job)
    units = np.concatenate([b.reshape(6, -1) for name, b in goal.items() if name.startswith("block.")], axis=1)
    gradients = units * goal["norms"][:, None]
    rows = score(job, MethodSpec(name="tracin", label="rows", options={"per": "query"}))
    assert "task.a.0" in rows.column_names
    dots = stages.Dots(request).value(job)["dots"] * goal["norms"]
    codes = job.aim().pair_codes
    want = gist(dots[None], (gradients @ gradients.T)[None], codes, rank=3)[1]
    np.testing.assert_allclose(table["task.a"].to_numpy(), want[:, 0], atol=1e-4)
    assert [c for c in table.column_names if c.startswith("task.")] == ["task.a", "task.b"]


def test_gradients_that_do_not_fit_are_refused(job, monkeypatch):
    monkeypatch.setattr(stages, "MOST_NUMBERS", 1000)
    spec = MethodSpec(name="rose", options={"per": "query", "loss": "margin"})
    with pytest.raises(RecipeError, match=r"6 gradients of [\d,]+ numbers each take .*`per: task`"):
        score(job, spec)
