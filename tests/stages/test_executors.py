"""Who computes for a job."""

from __future__ import annotations

import pytest

from keepset.errors import RecipeError
from keepset.recipe import parse_recipe
from keepset.runfolder.claims import Claims
from keepset.runfolder.execute import Forks, Here, Shared
from keepset.stages.executors import executor
from keepset.stages.job import Job
from tiny_recipe import quiet


def job(tmp_path, **more):
    given = {"run_dir": str(tmp_path / "run"), "pool": "pool.jsonl", "methods": ["random"], **more}
    return Job(parse_recipe(given), console=quiet())


def test_the_recipe_says_who_computes_and_claims_go_before(tmp_path, monkeypatch):
    assert isinstance(executor(job(tmp_path / "a")), Here)
    assert executor(job(tmp_path / "b", batching={"workers": 3})) == Forks(3)
    shared = job(tmp_path / "c", executor="ray")
    shared.run.claims, shared.run.wait = Claims(tmp_path), False
    assert executor(shared) == Shared(shared.run.claims, False)
    shared.run.claims = None
    asked = []
    monkeypatch.setattr("keepset.runfolder.execute_ray.ray_executor", lambda *a: asked.append(a))
    executor(job(tmp_path / "d", executor={"name": "ray", "address": "auto", "workers": 2}, model={"device": "cpu"}))
    assert asked[0][1:4] == ("auto", 2, False)
    monkeypatch.setattr("keepset.model.load.pick_device", lambda name: "cuda")
    with pytest.raises(RecipeError, match="on the CPU only"):
        executor(job(tmp_path / "e", batching={"workers": 2}))


def test_an_executor_may_change_between_sessions_and_idle_keys_are_refused(tmp_path):
    job(tmp_path)
    again = job(tmp_path, executor={"name": "ray", "workers": 4})
    assert again.run.recipe().executor.workers == 4
    with pytest.raises(RecipeError, match="executor.workers: does nothing without `name: ray`"):
        job(tmp_path, executor={"workers": 4})
    with pytest.raises(RecipeError, match="executor.name"):
        job(tmp_path, executor="dask")
    with pytest.raises(RecipeError, match=r"unknown key 'executor.adress' \(did you mean 'address'"):
        job(tmp_path, executor={"name": "ray", "adress": "auto"})
