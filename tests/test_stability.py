"""Rows in doubt at the cut of a selection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.stability import difference_noise, score_noise, stability

IDS = list("abcdef")


def test_rows_within_noise_of_the_other_side_are_named():
    scores = [5.0, 3.0 + 2e-6, 3.0 + 1e-6, 3.0, 3.0 - 1e-5, 1.0]
    found = stability(scores, IDS, [1, 1, 1, 0, 0, 0])
    assert found.chosen == ["c", "b"] and found.left_out == ["d"]
    assert found.gap == pytest.approx(1e-6) and found.share == pytest.approx(2 / 3)


def test_a_clear_cut_has_nobody_in_doubt():
    found = stability([5, 4, 3, 2, 1, 0], IDS, [1, 1, 1, 0, 0, 0])
    assert (found.chosen, found.left_out, found.gap, found.share) == ([], [], 1.0, 0.0)


def test_ties_are_in_doubt_even_without_noise():
    found = stability([1, 1, 1, 0], list("abcd"), [1, 1, 0, 0], noise=0)
    assert found.chosen == ["a", "b"] and found.left_out == ["c"] and found.gap == 0


@pytest.mark.parametrize("selected", [[1] * 4, [0] * 4])
def test_no_other_side_no_doubt(selected):
    assert stability([1, 1, 1, 1], list("abcd"), selected).gap is None


def test_rows_without_a_score_do_not_count():
    found = stability([2, 1, np.nan, np.inf], list("abcd"), [1, 0, 0, 1])
    assert found.gap == 1 and found.chosen == found.left_out == []


@pytest.mark.parametrize("noise", [-1.0, np.nan])
def test_mistakes(noise):
    with pytest.raises(ValueError, match="noise"):
        stability([1, 2], ["a", "b"], [1, 0], noise=noise)
    with pytest.raises(ValueError, match="lengths differ"):
        stability([1, 2], list("abc"), [1, 0])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 29), st.floats(0, 10), st.randoms())
def test_noise_of_that_size_moves_only_rows_that_were_named(scores, k, noise, random):
    """Whatever noise up to ε does to the scores, rows that were not named stay where they are."""
    values, ids = np.array(scores), np.array([f"{i:02d}" for i in range(len(scores))])
    k = min(k, len(values) - 1)
    top = np.zeros(len(values), bool)
    top[np.lexsort((ids, -values))[:k]] = True
    found = stability(values, ids, top, noise=noise)
    moved = values + np.array([random.uniform(-noise, noise) for _ in values])
    again = np.zeros(len(values), bool)
    again[np.lexsort((ids, -moved))[:k]] = True
    slack = 1e-9 * max(1.0, np.abs(values).max())  # the sums themselves round
    wide = stability(values, ids, top, noise=noise + slack)
    named = {*wide.chosen, *wide.left_out}
    assert {*found.chosen, *found.left_out} <= named
    assert set(ids[top != again]) <= named


def test_noise_of_davir_covers_what_rounded_losses_do():
    rng = np.random.default_rng(0)
    ini, ref = rng.uniform(1, 4, 1000), rng.uniform(1, 4, 1000)
    noisy = 1 - (ref * (1 + 1e-6 * rng.uniform(-1, 1, 1000))) / (ini * (1 + 1e-6 * rng.uniform(-1, 1, 1000)))
    change = np.abs(noisy - (1 - ref / ini))
    allowed = difference_noise(ini, ref)
    assert (change <= allowed * 1.001).all() and change.max() > 0.5 * allowed.max()


# -- noise of each method, and the run ------------------------------------------------------------------------------


def test_noise_of_a_middle_perplexity_is_the_rows_it_may_pass():
    n_tokens = np.ones(4)
    columns = {"score": np.zeros(4), "loss_ini": np.array([1, 2, 2 + 1e-7, 3.0]), "n_tokens": n_tokens}
    assert score_noise("perplexity", {}, columns).tolist() == [0, 1 / 3, 1 / 3, 0]


def test_noise_of_each_kind_of_score():
    losses = {"score": np.array([0.5]), "loss_ini": np.array([4.0]), "loss_ref": np.array([2.0]), "n_tokens": [8]}
    for name, want in (("davir", 1e-6), ("davir-ref", 4e-6), ("rho-sum", 6e-6), ("rho-mean", 0.75e-6), ("x", 1e-6)):
        assert score_noise(name, {}, losses)[0] == pytest.approx(want), name
    one = {"score": np.array([-0.5])}
    assert score_noise("ifd", {}, one)[0] == pytest.approx(1e-6)
    assert score_noise("rds", {}, one)[0] == pytest.approx(2e-6)
    assert score_noise("new", {}, one, relative=1e-3)[0] == pytest.approx(0.5e-3)
    gradients = {**one, "ckpt0.norm": np.array([30.0]), "ckpt1.norm": np.array([10.0]),
                 "ckpt0.lr": np.array([1e-3]), "ckpt1.lr": np.array([3e-3])}  # fmt: skip
    for name, options, want in (("rose", {}, 1e-6), ("rose", {"cosine": False}, 15e-6), ("tracin", {}, 6e-8)):
        assert score_noise(name, options, gradients)[0] == pytest.approx(want), name
    assert score_noise("grad-norm", {}, gradients)[0] == pytest.approx(0.5e-6)


METHODS = ["davir", "davir-ref", "rho-sum", "rho-mean", "perplexity", "ifd", "rose", "less", "tracin", "grad-norm",
           "grad-cosine", "rds", "rds+", "knn-shapley"]  # fmt: skip


def test_other_batches_stay_within_the_noise_and_rows_in_doubt_are_told(tmp_path):
    """Every method that runs a model, at two batch sizes; then a pool in which two rows differ by less than noise."""
    pytest.importorskip("trl")
    import io
    import json
    import shutil

    from rich.console import Console

    from crash import write_inputs
    from keepset.diagnose import diagnose_edge, record
    from keepset.job import Job
    from keepset.recipe import load_recipe
    from keepset.scoring import score
    from keepset.subsets import choose

    path = write_inputs(tmp_path / "inputs", methods=METHODS, run_dir=str(tmp_path / "a"))
    tables = {}
    for run, budget in (("a", 1024), ("b", 48)):
        recipe = load_recipe(path)
        recipe.run_dir, recipe.batching.token_budget = str(tmp_path / run), budget
        if run == "b":
            shutil.copytree(tmp_path / "a/models", tmp_path / "b/models")
        said = Console(file=io.StringIO(), width=300)
        job = Job(recipe, console=said)
        with job.run.lock():
            for spec in recipe.methods:
                tables[run, spec.label] = score(job, spec)
    for name in METHODS:
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
