"""`keepset validate` on a tiny model: planted truths, against SciPy's own correlations, resumed, priced."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file
from scipy import stats

from keepset.errors import RecipeError
from keepset.pipeline import bank as bank_module
from keepset.pipeline.bank import Bank
from keepset.pipeline.plan import plan_recipe
from keepset.pipeline.score import score
from keepset.pipeline.validate import Judge, scores_of, validate
from keepset.recipe import MethodSpec
from keepset.runfolder import layout
from keepset.runfolder.files import json_text
from keepset.runfolder.truth import Validation
from keepset.stages.job import Job
from keepset.stages.stage import JOBS
from tiny_recipe import quiet, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = {"num_train_epochs": 1, "learning_rate": 0.02, "per_device_train_batch_size": 4, "warmup_ratio": 0.0,
       "max_grad_norm": 0.0, "extra": {"optim": "sgd"}}  # fmt: skip
SPEC = {"rows": 10, "models": 12, "again": 3, "leave_out": 10, "seeds": [0, 1]}


def job_for(model_folder, data, run_dir, **spec):
    made = recipe(model_folder, data, run_dir, methods=["bm25", "length"], train=SGD, validate={**SPEC, **spec})
    job = Job(made, console=quiet())
    for method in [*made.methods, MethodSpec(name="random", label="random-0", options={"seed": 0})]:
        score(job, method)
    return job


def plant(job, label, values):
    """Write a score {id: value}; rows that it doesn't name get 0."""
    table = job.run.load_table(layout.scores("random-0"))
    column = pa.array([values.get(i, 0.0) for i in table["id"].to_pylist()], pa.float64())
    place = table.column_names.index("score")
    job.run.save_table(layout.scores(label), table.set_column(place, "score", column))


@pytest.fixture(scope="module")
def judged(model_folder, data, tmp_path_factory):
    """What leaving each row out does is measured first; the scores that it plants are then judged by the halves."""
    job = job_for(model_folder, data, tmp_path_factory.mktemp("judged"))
    first = validate(job)
    trained = [e["stage"] for e in job.run.costs() if e["stage"].startswith("train validation/")]
    truth = {one.ids[0]: one.worth["loss.target"] for one in first.left_out}
    plant(job, "true", truth)
    plant(job, "negated", {i: -v for i, v in truth.items()})
    second = validate(job)
    return job, second, trained


def figures(result, design="halves"):
    found = next(d for d in result.designs if d.name == design)
    return {(s.label, s.outcome): s for s in found.scores}, {o.name: o for o in found.outcomes}


def test_true_weights_are_near_one_negated_ones_near_minus_one_and_random_ones_at_zero(judged):
    _, result, _ = judged
    scores, outcomes = figures(result)
    assert scores["true", "loss.target"].of_mean.value > 0.9
    assert scores["negated", "loss.target"].of_mean.value < -0.9
    assert scores["true", "loss.target"].lds.value > 0.2 > outcomes["loss.target"].spread > 0
    chance = scores["random-0", "loss.target"].of_mean
    assert chance.low < 0 < chance.high
    left_out, _ = figures(result, "leave-out")
    assert left_out["true", "loss.target"].of_mean.value == pytest.approx(1.0)


def test_all_outcomes_stand_side_by_side(judged):
    _, result, _ = judged
    names = ["loss.target", "loss.target.preference", "loss.heldout", "loss.chosen", "loss.preference",
             "margin.implicit_mean.matched", "accuracy.policy_mean.matched"]  # fmt: skip
    for design in result.designs:
        assert [o.name for o in design.outcomes] == names
        assert {(s.label, s.outcome) for s in design.scores} == {
            (label, o) for label in ("bm25", "length", "random-0", "true", "negated") for o in names
        }
    ceilings = [o.ceiling for o in result.designs[0].outcomes]
    assert all(c is None or 0 <= c <= 1 for c in ceilings)
    stored = Job(judged[0].recipe, console=quiet()).run.load_json(layout.VALIDATION)
    assert json_text(Validation.from_json(stored, "x").to_json()) == json_text(result.to_json())


def test_nothing_is_trained_twice_for_other_scores(judged):
    job, _, trained = judged
    assert [e["stage"] for e in job.run.costs() if e["stage"].startswith("train validation/")] == trained
    assert len(trained) == len(set(trained)) == 12 + 3 + 11


def test_the_numbers_are_those_of_a_loop_over_the_files(judged):
    job, result, _ = judged
    bank, scores = Bank(job), figures(result)[0]
    table = job.run.load_table(layout.scores("bm25"))
    value = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    parts = {t: dict(zip(table["id"].to_pylist(), table[f"task.{t}"].to_pylist(), strict=True))
             for t in "ab" if f"task.{t}" in table.column_names}  # fmt: skip
    sums, losses, margins = [], [], []
    for member in bank.halves():
        rows = [str(i) for i, kept in zip(bank.ids, member.kept, strict=True) if kept]
        assert len(rows) == 5
        items = load_file(job.run.path / f"validation/evaluation/{member.name}-seed0/items.safetensors")
        sums.append([sum(parts[t][i] if t in parts else value[i] for i in rows) for t in job.target.tasks])
        losses.append(-items["target.chosen"] / items["target.n_chosen"])
        base = load_file(job.run.path / "validation/evaluation/base/items.safetensors")
        gain = {s: (items[f"pair.{s}"] - base[f"pair.{s}"]) / items[f"pair.n_{s}"] for s in ("chosen", "rejected")}
        margins.append(gain["chosen"] - gain["rejected"])
    sums, losses = np.array(sums), np.array(losses)
    each = [stats.spearmanr(sums[:, q], -losses[:, q]).statistic for q in range(losses.shape[1])]
    assert scores["bm25", "loss.target"].lds.value == pytest.approx(np.mean(each), abs=1e-9)
    n = {s: load_file(job.run.path / "validation/evaluation/base/items.safetensors")[f"pair.n_{s}"] for s in
         ("chosen", "rejected")}  # fmt: skip
    matched = np.abs(n["chosen"] - n["rejected"]) <= 0.2 * np.maximum(n["chosen"], n["rejected"])
    total = [sum(value[str(i)] for i, k in zip(bank.ids, m.kept, strict=True) if k) for m in bank.halves()]
    whole = stats.spearmanr(total, np.array(margins)[:, matched].mean(axis=1)).statistic
    assert scores["bm25", "margin.implicit_mean.matched"].of_mean.value == pytest.approx(whole, abs=1e-9)


def test_a_row_of_the_target_is_predicted_by_its_own_column(judged):
    job, _, _ = judged
    score(job, MethodSpec(name="bm25", label="own", options={"per": "query"}))
    try:
        bank = Bank(job)
        judge = Judge(job, bank, scores_of(job, bank), bank.measure(None))
        kept = np.stack([member.kept for member in bank.halves()]).astype(float)
        table = job.run.load_table(layout.scores("own"))
        place = {row_id: i for i, row_id in enumerate(table["id"].to_pylist())}
        names = [f"task.{task}.{k}" for k, task in enumerate(job.target.tasks)]
        values = np.stack([[table[name][place[str(i)]].as_py() for name in names] for i in bank.ids])
        found = judge.predictions(kept, "loss.target", tuple(job.target.tasks))[0]["own"]
        np.testing.assert_allclose(found, kept @ values, atol=1e-12)
        assert np.ptp(found, axis=1).max() > 0
        other = judge.predictions(kept, "loss.chosen", tuple(job.target.tasks))[0]["own"]
        assert other.shape == (len(kept), 1), "held-out queries are not the target's rows"
    finally:
        (job.run.path / layout.scores("own")).unlink()


def test_the_plan_is_the_log(judged):
    job, result, _ = judged
    works = list(Bank(job).works())
    for work in works[:-1]:
        entries = [e for e in job.run.costs() if work.logged(e)]
        assert len(entries) == work.trainings and sum(e["rows"] for e in entries) == work.rows
        assert sum(e["tokens"] for e in entries) == work.tokens
        assert sum(e["flops"] for e in entries) == pytest.approx(work.flops)
    measured = [e for e in job.run.costs() if e["stage"].startswith("evaluate validation/")]
    assert sum(e["flops"] for e in measured) == pytest.approx(works[-1].flops)
    assert sum(e["tokens"] for e in measured) == works[-1].tokens and len(measured) == 1 + 12 + 3 + 11
    assert result.tokens == sum(w.tokens for w in works[:-1]) and result.seconds > 0
    lines = {s["stage"]: s for s in plan_recipe(job.recipe, console=quiet())["steps"] if "validate" in s["stage"]}
    assert list(lines) == [w.stage for w in works] and all(s["seconds"] > 0 for s in lines.values())


def test_more_halves_keep_the_first_ones(judged):
    job, _, _ = judged
    more = Job(job.recipe.model_copy(update={"validation": job.recipe.validation.model_copy(update={"models": 20})}),
               console=quiet())  # fmt: skip
    for few, many in zip(Bank(job).halves(), Bank(more).halves(), strict=False):
        assert few.name == many.name and np.array_equal(few.kept, many.kept)
    halves = np.array([m.kept for m in Bank(more).halves()])
    assert (halves.sum(axis=1) == 5).all() and len({tuple(h) for h in halves}) > 15
    assert 0.2 < halves.mean(axis=0).min() < halves.mean(axis=0).max() < 0.8


def test_a_killed_bank_goes_on_and_ends_with_the_same_bytes(model_folder, data, tmp_path, monkeypatch):
    spec = {"models": 4, "again": 0, "leave_out": 0, "rows": 8}
    whole = job_for(model_folder, data, tmp_path / "whole", **spec)
    expected = validate(whole)
    broken = job_for(model_folder, data, tmp_path / "broken", **spec)
    calls, measure = [], bank_module.measure_model

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(bank_module, "measure_model", killed)
    with pytest.raises(KeyboardInterrupt):
        validate(broken)
    again = Job(broken.recipe, console=quiet())
    found = validate(again)
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    assert len(calls) == 4 + 2  # the base and two halves were measured, the third one again
    trained = [e["stage"] for e in again.run.costs() if e["stage"].startswith("train validation/")]
    assert len(trained) == len(set(trained)) == 4
    for file in sorted((tmp_path / "whole/validation").rglob("*.safetensors")):
        twin = tmp_path / "broken/validation" / file.relative_to(tmp_path / "whole/validation")
        assert twin.read_bytes() == file.read_bytes()


class Elsewhere:
    """An executor that takes whole trainings: each is done by another process's job."""

    here, trains = False, True

    def __init__(self):
        self.done = []

    def run(self, task, numbers, *, is_there, advance):
        for number in numbers:
            assert not is_there(number)
            JOBS.clear()
            pickle.loads(pickle.dumps(task))([number])
            assert is_there(number)
            self.done.append(number)


def test_an_executor_may_train_and_measure_the_members(model_folder, data, tmp_path, monkeypatch):
    spec = {"models": 3, "again": 0, "leave_out": 0, "rows": 6}
    here = validate(job_for(model_folder, data, tmp_path / "here", **spec))
    job, who = job_for(model_folder, data, tmp_path / "there", **spec), Elsewhere()
    monkeypatch.setattr(bank_module, "executor", lambda job: who)
    there = validate(job)
    assert who.done == [0, 1, 2] and replace(there, seconds=0.0) == replace(here, seconds=0.0)


def test_tenths_are_trained_alone_and_ordered(model_folder, data, tmp_path):
    job = job_for(model_folder, data, tmp_path, rows=20, models=0, again=12, leave_out=0, deciles=["length"], seeds=[0])
    result = validate(job)
    assert result.designs == () and {one.outcome for one in result.deciles} >= {"loss.target", "loss.preference"}
    bank, table = Bank(job), job.run.load_table(layout.scores("length"))
    value = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    parts = [
        [value[str(i)] for i in bank.ids[m.kept]]
        for m in bank.tenths("length", np.array([value[str(i)] for i in bank.ids]))
    ]
    assert [len(p) for p in parts] == [2] * 10 and all(min(a) >= max(b) for a, b in zip(parts, parts[1:], strict=False))
    for one in result.deciles:
        good = np.array(one.values) * (-1 if one.outcome.startswith("loss") else 1)
        if np.ptp(good):
            assert one.spearman == pytest.approx(stats.spearmanr(-np.arange(10), good).statistic)
            assert 0 < one.p <= 1
    (work, _) = Bank(job).works()
    entries = [e for e in job.run.costs() if work.logged(e)]
    assert len(entries) == 10 and sum(e["tokens"] for e in entries) == work.tokens
    assert sum(e["flops"] for e in entries) == pytest.approx(work.flops)


@pytest.mark.parametrize(("spec", "message"), [
    ({"models": 2}, "validate.models: 2 trainings order nothing"),
    ({"models": 0, "leave_out": 0, "again": 12}, "nothing to train"),
    ({"again": 2}, "validate.again: fewer than 3"),
    ({"deciles": ["lenght"]}, r"no scores by 'lenght' \(did you mean 'length'"),
])  # fmt: skip
def test_what_orders_nothing_is_refused(model_folder, data, tmp_path, spec, message):
    with pytest.raises(RecipeError, match=message):
        validate(job_for(model_folder, data, tmp_path, **spec))


def test_unscored_rows_count_as_the_mean_and_are_said(model_folder, data, tmp_path):
    job = job_for(model_folder, data, tmp_path, models=3, again=0, leave_out=0, rows=4)
    table = job.run.load_table(layout.scores("length"))
    gone = str(Bank(job).ids[0])
    values = [
        None if i == gone else v for i, v in zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True)
    ]
    place = table.column_names.index("score")
    job.run.save_table(layout.scores("length"), table.set_column(place, "score", pa.array(values, pa.float64())))
    assert validate(job).unscored == {"length": 1}
