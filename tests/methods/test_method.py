"""What every method of the table promises beside its formula: the noise of its scores, and what it says it needs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from keepset.methods.knn_shapley import shapley_of_similarities
from keepset.methods.method import NOISE, difference_noise
from keepset.methods.table import METHODS, needs_model
from keepset.pipeline.choose import scored_tokens
from keepset.pipeline.score import stages_of
from keepset.recipe import MethodSpec
from keepset.stages.job import Job
from keepset.stages.stage import closure
from tiny_recipe import quiet, recipe

NOT_KNOWN = {
    "forgetting",
    "gist",
    "instructdiff",
    "metagradient",
    "influence",
    "datainf",
    "ekfac",
    "in-run-shapley",
    "tmc-shapley",
}
WITH_NOISE = sorted(name for name in METHODS if needs_model(name) and name not in NOT_KNOWN)


def score_noise(name, options, columns, *, relative=NOISE):
    return METHODS[name](**options).noise(columns, relative)


def test_a_method_needs_what_its_stages_are(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["rose"])
    job = Job(made, console=quiet())
    for name, method in METHODS.items():
        stages = stages_of(job, MethodSpec(name=name, options={"players": "source"} if name == "tmc-shapley" else {}))
        words = {stage.word for stage in closure(job, stages.values())}
        assert set(method.needs) - {"text", "target", "pairs"} == words, name
        assert ("text" in method.needs) == (not stages), name


def test_noise_of_davir_covers_what_rounded_losses_do():
    rng = np.random.default_rng(0)
    ini, ref = rng.uniform(1, 4, 1000), rng.uniform(1, 4, 1000)
    noisy = 1 - (ref * (1 + 1e-6 * rng.uniform(-1, 1, 1000))) / (ini * (1 + 1e-6 * rng.uniform(-1, 1, 1000)))
    change = np.abs(noisy - (1 - ref / ini))
    allowed = difference_noise(ini, ref)
    assert (change <= allowed * 1.001).all() and change.max() > 0.5 * allowed.max()


def test_noise_of_a_middle_perplexity_is_the_rows_it_may_pass():
    n_tokens = np.ones(4)
    columns = {"score": np.zeros(4), "loss_ini": np.array([1, 2, 2 + 1e-7, 3.0]), "n_tokens": n_tokens}
    assert score_noise("perplexity", {}, columns).tolist() == [0, 1 / 3, 1 / 3, 0]


def test_noise_of_each_kind_of_score():
    losses = {"score": np.array([0.5]), "loss_ini": np.array([4.0]), "loss_ref": np.array([2.0]), "n_tokens": [8]}
    for name, want in (("davir", 1e-6), ("davir-ref", 4e-6), ("rho-sum", 6e-6), ("rho-mean", 0.75e-6)):
        assert score_noise(name, {}, losses)[0] == pytest.approx(want), name
    one = {"score": np.array([-0.5])}
    assert score_noise("ifd", {}, one)[0] == pytest.approx(1e-6)
    assert score_noise("rds", {}, one)[0] == pytest.approx(2e-6)
    assert score_noise("loss-ref", {}, one, relative=1e-3)[0] == pytest.approx(0.5e-3)
    assert score_noise("el2n", {}, one)[0] == pytest.approx(1e-6)
    assert score_noise("knn-shapley", {"k": 1}, one)[0] == pytest.approx(4e-6)
    gradients = {**one, "ckpt0.norm": np.array([30.0]), "ckpt1.norm": np.array([10.0]),
                 "ckpt0.lr": np.array([1e-3]), "ckpt1.lr": np.array([3e-3])}  # fmt: skip
    for name, options, want in (("rose", {}, 1e-6), ("rose", {"cosine": False}, 15e-6), ("tracin", {}, 6e-8)):
        assert score_noise(name, options, gradients)[0] == pytest.approx(want), name
    assert score_noise("grad-norm", {}, gradients)[0] == pytest.approx(0.5e-6)

    for column in ("ckpt0.store_rms", "ckpt1.store_rms"):  # a sketch: its own error is larger
        gradients[column] = np.array([0.01])
    assert score_noise("rose", {}, gradients) is score_noise("tracin", {}, gradients) is None
    assert score_noise("less", {"map": "sign"}, {**one, "ckpt0.norm": np.ones(1)}) is None


def test_noise_that_is_not_known_is_not_told():
    columns = {"score": np.array([5000.0])}
    assert all(score_noise(name, {}, columns) is None for name in METHODS if name not in WITH_NOISE)


LOSSES = {
    "loss": lambda x, t: x["loss_ini"] / t,
    "loss-ref": lambda x, t: x["loss_ref"] / t,
    "davir": lambda x, t: 1 - x["loss_ref"] / x["loss_ini"],
    "davir-ref": lambda x, t: x["loss_ini"] / x["loss_ref"] - 1,
    "rho-sum": lambda x, t: x["loss_ini"] - x["loss_ref"],
    "rho-mean": lambda x, t: (x["loss_ini"] - x["loss_ref"]) / t,
    "davir rejected": lambda x, t: 1 - x["loss_ref.rejected"] / x["loss_ini.rejected"],
    "davir margin": lambda x, t: x["loss_ref.rejected"] / x["loss_ini.rejected"] - x["loss_ref"] / x["loss_ini"],
    "ifd": lambda x, t: x["loss_ini"] / x["loss_alone"],
    "perplexity": lambda x, t: -x["loss_ini"] / t,
}
SIDE = {"davir rejected": {"side": "rejected"}, "davir margin": {"side": "margin"}, "perplexity": {"prefer": "low"}}


@pytest.mark.parametrize("name", LOSSES)
def test_a_band_is_what_noise_of_the_losses_does_and_not_much_more(name):
    rng = np.random.default_rng(0)
    kinds = ("loss_ini", "loss_ref", "loss_ini.rejected", "loss_ref.rejected", "loss_alone")
    losses, n_tokens = {kind: rng.gamma(3, 20, 400) for kind in kinds}, rng.integers(2, 60, 400)
    score = LOSSES[name](losses, n_tokens)
    columns = {**losses, "score": score, "n_tokens": n_tokens}
    band = score_noise(name.split()[0], SIDE.get(name, {}), columns, relative=1e-5)
    worst = np.zeros(400)
    for signs in itertools.product((-1, 1), repeat=len(kinds)):
        moved = {kind: x * (1 + 1e-5 * sign) for (kind, x), sign in zip(losses.items(), signs, strict=True)}
        worst = np.maximum(worst, np.abs(LOSSES[name](moved, n_tokens) - score))
    assert (worst <= band * 1.001).all() and (worst >= band * 0.999).all()


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_band_of_knn_shapley_covers_moved_similarities(k):
    rng = np.random.default_rng(k)
    similarities = rng.uniform(-1, 1, 40)
    band = score_noise("knn-shapley", {"k": k}, {"score": np.zeros(40)}, relative=5e-4)[0]
    for _ in range(200):
        moved = similarities + 1e-3 * rng.choice([-1, 1], 40)  # either side of a cosine carries 5e-4
        change = np.abs(shapley_of_similarities(moved, k) - shapley_of_similarities(similarities, k))
        assert change.max() <= band


def test_the_tokens_of_a_mean_are_those_that_were_scored(model_folder, data, tmp_path):
    pool = [{"path": data["pairs"], "pairs": True}]
    made = recipe(model_folder, data, tmp_path, methods=["rho-mean"], pool=pool)
    job = Job(made, console=quiet())
    chosen, whole = scored_tokens(job, made.methods[0]), job.n_tokens()
    assert chosen.tolist() == [int(row.supervised.sum()) for row, _ in job.sides[1]] and (chosen < whole).all()


def test_other_batches_stay_within_the_noise_and_rows_in_doubt_are_told(tmp_path):
    """Every method that runs a model, at two batch sizes; then a pool in which two rows differ by less than noise."""
    pytest.importorskip("trl")
    import io
    import json
    import shutil

    from rich.console import Console

    from crash import write_inputs
    from keepset.pipeline.choose import choose
    from keepset.pipeline.findings import diagnose_edge, record
    from keepset.pipeline.score import score
    from keepset.recipe import load_recipe

    path = write_inputs(tmp_path / "inputs", methods=WITH_NOISE, run_dir=str(tmp_path / "a"))
    tables = {}
    for run, budget in (("a", 1024), ("b", 48)):
        made = load_recipe(path)
        made.run_dir, made.batching.token_budget = str(tmp_path / run), budget
        if run == "b":
            shutil.copytree(tmp_path / "a/models", tmp_path / "b/models")
        said = Console(file=io.StringIO(), width=300)
        job = Job(made, console=said)
        with job.run.lock():
            for spec in made.methods:
                tables[run, spec.label] = score(job, spec)
    for name in WITH_NOISE:
        columns = {n: tables["a", name][n].to_numpy() for n in tables["a", name].column_names}
        change = np.abs(tables["b", name]["score"].to_numpy() - columns["score"])
        assert (change <= score_noise(name, {}, columns)).all(), (name, change.max())
    subset = choose(job, "davir", "25%")
    record(job, diagnose_edge(subset))
    assert subset.edge.gap > 0 and subset.edge.chosen == []
    assert json.loads((tmp_path / "b/subsets.json").read_text())["davir"]["edge"]["chosen"] == []

    # two rows at the cut come as near to each other as rounding
    table = tables["b", "davir"]
    order = np.argsort(-table["score"].to_numpy())
    ini, ref = (table[k].to_numpy().copy() for k in ("loss_ini", "loss_ref"))
    cut = subset.n_rows
    ini[order[cut]], ref[order[cut]] = ini[order[cut - 1]], ref[order[cut - 1]] * (1 + 1e-7)
    for name, column in (("loss_ini", ini), ("loss_ref", ref), ("score", (ini - ref) / ini)):
        table = table.set_column(table.column_names.index(name), name, [column])
    job.run.save_table("scores/davir.parquet", table)
    subset = choose(job, "davir", "25%")
    record(job, diagnose_edge(subset))
    doubtful = str(table["id"][int(order[cut - 1])])
    assert subset.edge.chosen == [doubtful]
    assert json.loads((tmp_path / "b/subsets.json").read_text())["davir"]["edge"]["left_out"] == [
        str(table["id"][int(order[cut])])
    ]
    findings = json.loads((tmp_path / "b/findings.json").read_text())
    assert [f["figure"] for f in findings if f["name"] == "stability"] == [1]
    assert f"1 of {cut} chosen rows is within numerical noise of rows left out: {doubtful}" in said.file.getvalue()
    job.recipe.select.policy = "mmr"
    assert choose(job, "davir", "25%").edge is None
