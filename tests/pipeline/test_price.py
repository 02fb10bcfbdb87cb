"""The counts that plan and prices rest on, against what a run really logs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from keepset.methods.table import METHODS, needs_model
from keepset.pipeline.price import selection_work
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe

MODEL_METHODS = [name for name in METHODS if needs_model(name)]


@pytest.mark.parametrize("folds", [0, 2])
def test_counted_operations_are_those_of_the_log(folds, model_folder, data, tmp_path):
    few = {"name": "tmc-shapley", "options": {"permutations": 4}}  # each set of rows is a training
    content = {"name": "davir", "label": "davir-content", "options": {"end_of_turn": False}}
    names = [few if n == "tmc-shapley" else n for n in [*MODEL_METHODS, content]] if not folds else ["davir"]
    reference = {"num_train_epochs": 1, "folds": folds}
    job = Job(recipe(model_folder, data, tmp_path, methods=names, reference=reference), console=quiet())
    hold_against_the_log(job)


def hold_against_the_log(job):
    """Score by all methods: every stage that a run logs is counted, with the same operations and tokens."""
    work = selection_work(job, job.recipe.methods)
    assert len({w.stage for w in work}) == len(work) and all(w.ids for w in work)
    for spec in job.recipe.methods:
        score(job, spec)
    costs = [e for e in job.run.costs() if "flops" in e]
    assert {e["stage"] for e in job.run.costs() if "flops" not in e} == {f"score {m.label}" for m in job.recipe.methods}
    assert [e["stage"] for e in costs if not any(w.logged(e) for w in work)] == []
    groups = {}  # works that share entries: a sweep of two losses is logged once
    for w in work:
        groups.setdefault(frozenset(i for i, e in enumerate(costs) if w.logged(e)), []).append(w)
    for places, some in merge(groups).items():
        named = [w.stage for w in some]
        assert sum(w.flops for w in some) == pytest.approx(sum(costs[i]["flops"] for i in places), rel=1e-9), named
        tokens = sum(costs[i]["tokens"] for i in places)
        assert sum(w.tokens for w in some) == pytest.approx(tokens, abs=len(places)), named
    hold_against_an_older_log(selection_work(job, job.recipe.methods), costs)
    return work


def hold_against_an_older_log(work, costs):
    """Folders made before entries had ids: an entry is of the works that it is of by its name, and of their likes."""
    for entry in costs:
        old = {k: v for k, v in entry.items() if k != "ids"}
        by_id, by_title = ({w.stage for w in work if w.logged(e)} for e in (entry, old))
        assert by_id and by_id <= by_title, entry["stage"]


def merge(groups):
    """Groups of entries that overlap, put together."""
    found: dict[frozenset[int], list] = {}
    for places, some in groups.items():
        for other in [o for o in found if o & places]:
            places, some = places | other, found.pop(other) + some
        found[places] = some
    return found


def of(name, label=None, shots=None, **options):
    return {"name": name, "label": label or name, "shots": shots, "options": options}


FOCAL, SMOOTH = {"token_loss": "focal"}, {"token_loss": "label-smoothed"}
TRAINED = {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
CASES = {
    "token losses": ([of("davir"), of("davir", "focal", **FOCAL), of("rho-mean", **SMOOTH), of("loss", **SMOOTH),
                      of("davir", "content", end_of_turn=False, **FOCAL)], {}),
    "folds": ([of("davir"), of("rho-sum", **FOCAL)], {"reference": {**TRAINED, "folds": 2}}),
    "a share": ([of("davir"), of("instructdiff")], {"reference": {**TRAINED, "fraction": 0.4, "folds": 2}}),
    "full reference": ([of("davir", **FOCAL), of("davir", "content", end_of_turn=False)],
                       {"reference": {**TRAINED, "full": True}}),
    "states": ([of("rds"), of("rds", "few", 1), of("rds", "mean", 1, pooling="weighted_mean"), of("knn-shapley")], {}),
    "embeddings": ([of("rds", embedding_model="ENCODER"), of("rds", "few", 1, embedding_model="ENCODER")], {}),
    "gradients": ([of("less"), of("less", "few", 1), of("rose", normalise="task"), of("rose", "plain", map="sgd"),
                   of("rose", "beta", normalise="task", beta=0.5, reference="none"), of("rose", "m", loss="margin"),
                   of("tracin"), of("ekfac", shots=1), of("datainf"), of("influence", "few-rows", curvature_rows=3)],
                  {"gradients": {"last_layers": 1, "max_completion_tokens": 3}}),
    "influence alone": ([of("ekfac"), of("ekfac", "max", reduce="max")], {}),
    "store": ([of("less"), of("less", "dots", cosine=False), of("less", "few", 1), of("tracin"), of("rose", map="sgd")],
              {"gradients": {"store": "STORE", "store_dim": 64, "store_sample": 5}}),
    "shapley": ([of("in-run-shapley"), of("in-run-shapley", "max", reduce="max"),
                 of("in-run-shapley", "second", 1, order="second", epochs=2, batch_size=8),
                 of("tmc-shapley", players="source", permutations=4, rows_per_player=3),
                 of("tmc-shapley", "more", players="source", permutations=6, rows_per_player=3),
                 of("tmc-shapley", "few", 1, players="source", permutations=4, rows_per_player=3)], {}),
    "metagradient": ([of("metagradient"), of("metagradient", "max", 1, reduce="max"),
                      of("metagradient", "sft", loss="sft")], {}),
    "metagradient of pairs": ([of("metagradient")], {"train": {**TRAINED, "loss": "dpo"}}),
    "pairs": ([of("davir", side="margin"), of("davir", "focal", side="rejected", **FOCAL), of("rose"), of("less")],
              {"train": {**TRAINED, "loss": "dpo"}}),
    "last checkpoint": ([of("forgetting"), of("less"), of("tracin")],
                        {"warmup": {**TRAINED, "num_train_epochs": 2, "checkpoints": "last"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_options_are_counted_as_they_are_logged(case, model_folder, data, encoder_folder, tmp_path):
    methods, more = json.loads(
        json.dumps(CASES[case]).replace("ENCODER", str(encoder_folder)).replace("STORE", str(tmp_path / "store"))
    )
    if case.endswith("pairs"):
        more["pool"] = [{"path": data["pairs"], "pairs": True}]
    if case == "shapley":
        more["pool"] = [{"path": data[name], "name": name} for name in ("pool", "rows")]
    job = Job(recipe(model_folder, data, tmp_path / "run", methods=methods, **more), console=quiet())
    work = hold_against_the_log(job)
    again = Job(job.recipe, console=quiet())
    after = [replace(w, titles=()) for w in selection_work(again, job.recipe.methods)]
    assert after == [replace(w, titles=()) for w in work]  # the same after a run
    assert all(sum(w.flops for w in selection_work(job, [spec])) > 0 for spec in job.recipe.methods)


def test_checkpoints_from_elsewhere_are_counted(model_folder, data, tmp_path):
    first = Job(recipe(model_folder, data, tmp_path / "first", methods=["tracin"]), console=quiet())
    score(first, first.recipe.methods[0])
    given = {"path": str(tmp_path / "first/models/warmup")}
    made = recipe(model_folder, data, tmp_path / "second", methods=["tracin"], warmup=given)
    hold_against_the_log(Job(made, console=quiet()))


def test_a_method_alone_pays_for_its_own_stages_only(model_folder, data, tmp_path):
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


def test_a_resumed_run_has_the_same_price(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["perplexity"])
    job = Job(made, console=quiet())
    score(job, made.methods[0])
    before = [w.flops for w in selection_work(job, made.methods)]
    again = Job(made, console=quiet())
    (tmp_path / "costs.jsonl").write_text("")
    assert [w.flops for w in selection_work(again, made.methods)] == before
