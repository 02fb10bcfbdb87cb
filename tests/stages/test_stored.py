"""The recipe's `gradients`: a reusable store, top layers, capped answers; and a warm-up taken from another run."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from keepset.errors import PlanMismatch
from keepset.methods.table import score
from keepset.pipeline.findings import diagnose_scores
from keepset.stages.counts import selection_work
from keepset.stages.job import Job
from keepset.stages.losses import warmup_checkpoints
from tiny_recipe import quiet, recipe
from tolerance import MAPPED


@pytest.fixture(scope="module")
def first(model_folder, data, tmp_path_factory):
    """A finished exact run whose warm-up the others take."""
    run_dir = tmp_path_factory.mktemp("first")
    job = Job(recipe(model_folder, data, run_dir, methods=["rose"]), console=quiet())
    return job, score(job, job.recipe.methods[0])


def other(first, run_dir, pool=None, method="rose", **gradients):
    """A second run on the first one's warm-up checkpoints."""
    made = first[0].recipe
    warmup = made.warmup.model_copy(update={"path": str(first[0].run.path / "models/warmup")})
    changes = {"run_dir": str(run_dir), "warmup": warmup, "gradients": made.gradients.model_copy(update=gradients)}
    methods = [made.methods[0].model_copy(update={"name": method, "label": method})]
    if pool:
        changes["pool"] = [made.pool[0].model_copy(update={"path": pool})]
    return Job(made.model_copy(update={**changes, "methods": methods}), console=quiet())


def numbers(table):
    return table["score"].to_numpy()


def test_a_warm_up_of_another_run_is_taken_as_it_is(first, tmp_path):
    job = other(first, tmp_path)
    assert np.array_equal(numbers(score(job, job.recipe.methods[0])), numbers(first[1]))
    assert not (tmp_path / "models").exists()
    assert "warm-up" not in [w.stage for w in selection_work(job, job.recipe.methods)]
    job = other(first, tmp_path / "last")
    job.recipe.warmup.checkpoints = "last"
    assert len(warmup_checkpoints(job)) == 1


def test_a_store_is_built_once_and_read_for_the_next_target(first, tmp_path):
    options = {"store": str(tmp_path / "store"), "store_dim": 1 << 18, "store_sample": 8}
    job = other(first, tmp_path / "a", **options)
    table = score(job, job.recipe.methods[0])
    assert np.corrcoef(numbers(table), numbers(first[1]))[0, 1] > 0.95
    assert np.allclose(table["ckpt0.norm"].to_numpy(), first[1]["ckpt0.norm"].to_numpy(), rtol=MAPPED)
    assert np.allclose(table["ckpt1.momentum"].to_numpy(), first[1]["ckpt1.momentum"].to_numpy(), atol=MAPPED)
    assert 0 < table["ckpt0.store_rms"][0].as_py() < 0.05
    finding = next(f for f in diagnose_scores(table, "rose") if f.name == "store-agreement")
    assert finding.figure == pytest.approx(min(table[f"ckpt{c}.store_spearman"][0].as_py() for c in (0, 1)), abs=1e-4)
    costs = [e for e in job.run.costs() if "flops" in e]
    work = [w for w in selection_work(job, job.recipe.methods) if w.logged]
    assert sum(e["flops"] for e in costs) == pytest.approx(sum(w.flops for w in work))

    again = other(first, tmp_path / "b", method="less", **options)
    exact = other(first, tmp_path / "c", method="less")
    estimated = numbers(score(again, again.recipe.methods[0]))
    assert np.corrcoef(estimated, numbers(score(exact, exact.recipe.methods[0])))[0, 1] > 0.95
    assert not [e for e in again.run.costs() if "flops" in e and re.match("gradients at", e["stage"])]


def test_a_pool_that_grew_at_its_end_adds_rows_and_another_is_refused(first, tmp_path):
    options = {"store": str(tmp_path / "store"), "store_dim": 256, "store_sample": 0}
    lines = open(first[0].recipe.pool[0].path).read().splitlines(keepends=True)
    small, other_pool = tmp_path / "pool.jsonl", tmp_path / "other.jsonl"
    small.write_text("".join(lines[:15]))
    other_pool.write_text("".join(lines[3:22]))
    job = other(first, tmp_path / "a", pool=str(small), **options)
    score(job, job.recipe.methods[0])
    grown = other(first, tmp_path / "b", **options)
    score(grown, grown.recipe.methods[0])
    added = [e["rows"] for e in grown.run.costs() if e["stage"].startswith("gradients at")]
    assert added == [22 - 15] * 2
    wrong = other(first, tmp_path / "c", pool=str(other_pool), **options)
    with pytest.raises(PlanMismatch, match="are not the first"):
        score(wrong, wrong.recipe.methods[0])


@pytest.mark.parametrize("gradients", [{"last_layers": 1}, {"max_completion_tokens": 2}])
def test_cheaper_gradients_are_those_of_fewer_layers_or_tokens(first, tmp_path, gradients):
    job = other(first, tmp_path, **gradients)
    table = score(job, job.recipe.methods[0])
    assert not np.allclose(numbers(table), numbers(first[1]))
    costs = [e["flops"] for e in job.run.costs() if e["stage"].startswith("gradients at")]
    full = [e["flops"] for e in first[0].run.costs() if e["stage"].startswith("gradients at")]
    work = [w.flops for w in selection_work(job, job.recipe.methods) if w.logged.startswith("gradients at")]
    assert sum(costs) == pytest.approx(sum(work))
    if "last_layers" in gradients:
        assert sum(costs) == pytest.approx(0.75 * sum(full))
    else:
        assert sum(costs) < 0.9 * sum(full)
        cut = [r for r in job.rows]
        assert max(int(r.supervised.sum()) for r in cut) > 2  # the job's own rows stay whole
    stored = pq.read_table(tmp_path / "scores/rose.parquet")
    assert np.array_equal(stored["score"].to_numpy(), numbers(table))


def test_checkpoints_whose_rates_are_zero_count_alike(first, tmp_path):
    """A short warm-up ends at the rate 0: `last: 1` has no weight but equal ones."""
    job = other(first, tmp_path)
    job.recipe.methods[0].options["last"] = 1
    folder = tmp_path / "warmup"
    shutil.copytree(job.recipe.warmup.path, folder)
    meta = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2])) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "mean_lr": 0.0}))
    job.recipe.warmup.path = str(folder)
    table = score(job, job.recipe.methods[0])
    assert table["ckpt0.lr"][0].as_py() == 1.0 and np.isfinite(numbers(table)).all()
