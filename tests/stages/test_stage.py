"""Stages as values: equal ones share passes, ids and prices, and any process can do a pass's shards."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from keepset.pipeline.score import stages_of
from keepset.recipe import MethodSpec
from keepset.runfolder.files import canonical
from keepset.stages.influence import Dots
from keepset.stages.job import Job
from keepset.stages.losses import Losses
from keepset.stages.stage import Pass, closure, fetch
from keepset.stages.trained import Reference, Warmup
from keepset.train.warmup import pick_subset
from tiny_recipe import quiet, recipe

ELSEWHERE = """
import pickle, sys
task = pickle.loads(sys.stdin.buffer.read())
task([1, 2])
"""


def shards_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("0*.safetensors")}


@pytest.mark.parametrize("name", ["loss", "rds", "davir", "less"])
def test_another_process_makes_the_same_shards_from_the_pickled_pass(name, model_folder, data, tmp_path):
    """What an executor on another machine would do: it gets the task and shard numbers, and sees the run folder."""
    from keepset.runfolder.execute import Task
    from keepset.stages.stage import Sweep, make_shards

    made = recipe(model_folder, data, tmp_path / "a", methods=[name])
    job = Job(made, console=quiet())
    sweeps = [s for s in stages_of(job, made.methods[0]).values() if isinstance(s, Sweep)]
    same = [s for s in sweeps if s.together(job) == sweeps[0].together(job)]
    fetch(job, same)
    own = Pass(canonical(made.model_dump(mode="json")), tuple(same))
    folders = [own.shards(job).place(stage.name(job)) for stage in same]
    here = [shards_of(folder) for folder in folders]
    assert all(len(names) == 3 for names in here)
    for folder in folders:
        for number in (1, 2):
            (folder / f"0000{number}.safetensors").unlink()
    task = pickle.dumps(Task(make_shards, own))
    subprocess.run([sys.executable, "-c", ELSEWHERE], input=task, check=True, capture_output=True)
    assert [shards_of(folder) for folder in folders] == here


def test_equal_stages_are_one_and_every_field_counts():
    assert Losses() == Losses("base", "ce", "chosen") and len({Losses(), Losses(of="chosen")}) == 1
    others = [Losses("reference"), Losses(token_loss="focal"), Losses(of="content"), Losses("fold", at=1)]
    assert len({Losses(), *others}) == 5


def test_what_is_needed_comes_first_and_once(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["davir", "less"]), console=quiet())
    stages = [s for m in job.recipe.methods for s in stages_of(job, m).values()]
    order = closure(job, stages)
    assert len(order) == len(set(order))
    assert order.index(Reference()) < order.index(Losses("reference"))
    assert all(order.index(Warmup()) < k for k, stage in enumerate(order) if isinstance(stage, Dots))
    for stage in order:
        assert all(order.index(need) < order.index(stage) for need in stage.needs(job))


def test_ids_hang_on_what_the_numbers_are_made_of_and_train_nothing(model_folder, data, tmp_path):
    def ids(run_dir, **more):
        job = Job(recipe(model_folder, data, tmp_path / run_dir, **more), console=quiet())
        stages = {**stages_of(job, MethodSpec(name="davir")), **stages_of(job, MethodSpec(name="less"))}
        assert not (tmp_path / run_dir / "models").exists()
        return {name: stage.id(job) for name, stage in stages.items()}

    first = ids("a")
    assert ids("b") == first and len(set(first.values())) == len(first)
    assert ids("c", batching={"token_budget": 64, "shard_rows": 4}) == first
    other = ids("d", reference={"num_train_epochs": 3})
    assert {name for name in first if first[name] != other[name]} == {"ref"}
    other = ids("e", target=data["pairs"])
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.startswith("checkpoint")}


@pytest.mark.parametrize("folds", [0, 2])
def test_a_reference_on_a_share_of_the_pool_is_trained_on_rows_drawn_by_id(folds, model_folder, data, tmp_path):
    def reference(name, **spec):
        return Job(recipe(model_folder, data, tmp_path / name, reference={"folds": folds, **spec}), console=quiet())

    def ids(job):
        rows = stage._rows(job)
        assert len(rows[0]) == len(rows[1])
        return [str(i) for i in rows[1]]

    stage = Reference(0 if folds else -1)
    whole, same = reference("whole"), reference("same", fraction=1)
    assert stage.inputs(whole) == stage.inputs(same) and "fraction" not in stage.inputs(whole)["args"]
    some = reference("some", fraction=0.4)
    assert len(ids(some)) == int(0.4 * len(ids(whole))) and set(ids(some)) < set(ids(whole))
    assert stage.inputs(some)["args"]["fraction"] == 0.4
    assert len(stage.works(some)[0].titles) == 1 and stage.works(some)[0].rows == len(ids(some))
    assert stage.works(some)[0].flops < stage.works(whole)[0].flops
    picked = pick_subset(sorted(ids(whole)), 0.4, 0)
    assert sorted(ids(some)) == [sorted(ids(whole))[i] for i in picked]
    other = Job(recipe(model_folder, data, tmp_path / "seed", seed=3, reference={"folds": folds, "fraction": 0.4}),
                console=quiet())  # fmt: skip
    assert set(ids(other)) != set(ids(some))


def test_beside_shares_the_pass_and_what_cannot_does_not(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["less", "rose", "tracin"]), console=quiet())
    less, rose, tracin = ([*stages_of(job, m).values()] for m in job.recipe.methods)
    values = fetch(job, less[:1], [*rose, *tracin])
    assert set(values) == {less[0], rose[0]}  # one map, one checkpoint
    passes = [e["stage"] for e in job.run.costs() if e["stage"].startswith("gradients at")]
    assert len(passes) == 1
    again = fetch(job, rose[:1])[rose[0]]
    assert np.array_equal(again["dots"], values[rose[0]]["dots"])
    assert [e["stage"] for e in job.run.costs() if e["stage"].startswith("gradients at")] == passes
