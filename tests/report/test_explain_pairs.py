"""The validation rows behind a ROSE score add up to it; `report --why` stores them and the page shows them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from keepset.errors import KeepsetError
from keepset.methods.table import score
from keepset.recipe import parse_recipe
from keepset.report.explain_pairs import pair_pulls, print_pair_pulls, tell_without
from keepset.report.payload import build_payload
from keepset.report.read import read_run
from keepset.report.why import write_why
from keepset.runfolder.files import file_digest
from keepset.runfolder.run import Run
from keepset.stages.job import Job
from tolerance import FORWARD


@pytest.fixture(scope="module")
def scores(small_run):
    return pq.read_table(small_run / "scores/rose.parquet").to_pylist()


@pytest.fixture(scope="module")
def pulls(small_run, scores):
    return pair_pulls(small_run, [row["id"] for row in scores], "rose")


def test_the_pulls_of_a_task_s_rows_average_to_its_score(scores, pulls):
    for row in scores:
        facts = pulls[row["id"]]
        assert facts["exact"] and len(facts["pairs"]) == 5 and len(facts["weights"]) == 2
        for task in "ab":
            values = [p["value"] for p in facts["pairs"] if p["task"] == task]
            assert np.mean(values) == pytest.approx(row[f"task.{task}"], abs=FORWARD)
        for pair in facts["pairs"]:
            assert np.dot(facts["weights"], pair["checkpoints"]) == pytest.approx(pair["value"], abs=1e-9)
        values = [p["value"] for p in facts["pairs"]]
        assert values == sorted(values, reverse=True) and -1 <= min(values) <= max(values) <= 1


def test_doing_without_rows_really_turns_the_decision(scores, pulls):
    kept = [row["score"] for row in scores if row["selected"]]
    turned = 0
    for row in scores:
        found, pairs = pulls[row["id"]]["without"], pulls[row["id"]]["pairs"]
        if found is None:
            continue
        turned += 1
        assert found["kept"] == row["selected"] and found["cut"] == pytest.approx(min(kept))
        left = [p["value"] for p in pairs if p["task"] == found["task"]]
        left = left[found["removed"] :] if row["selected"] else left[: len(left) - found["removed"]]
        others = np.mean([p["value"] for p in pairs if p["task"] != found["task"]])
        assert found["score"] == pytest.approx(max(np.mean(left), others))
        assert (found["score"] < found["cut"]) == row["selected"]
        assert ("out, at the cut" if row["selected"] else "in, at the cut") in tell_without(found)
    assert turned


def test_explaining_writes_nothing(small_run, tmp_path, scores):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "quarantine.jsonl").unlink()  # whoever scores writes it
    before = {p: file_digest(p) for p in run.rglob("*") if p.is_file()}
    with Run(run).lock():  # somebody else is at work in it
        pair_pulls(run, [scores[0]["id"]], "rose")
    assert {p: file_digest(p) for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("outside", [False, True])
def test_options_that_change_the_score_change_what_is_told(small_run, tmp_path, outside):
    data = Run(small_run).recipe().model_dump(mode="json")
    shutil.copytree(small_run / "models/warmup", tmp_path / "models/warmup")
    less = {"name": "less", "shots": 1, "options": {"last": 1}}
    data |= {"run_dir": str(tmp_path), "methods": [less], "gradients": {"last_layers": 1, "max_completion_tokens": 2}}
    if outside:
        data["warmup"] = {"path": str(small_run / "models/warmup")}
    made = parse_recipe(data)
    table = score(Job(made, console=Console(file=io.StringIO())), made.methods[0]).to_pylist()
    for row in table[:4]:
        facts = pair_pulls(tmp_path, [row["id"]], "less")[row["id"]]
        assert facts["exact"] and len(facts["weights"]) == 1 and len(facts["pairs"]) == 2
        for pair in facts["pairs"]:
            assert pair["value"] == pytest.approx(row[f"task.{pair['task']}"], abs=1e-6)


def test_the_printed_form(scores, pulls):
    console = Console(file=io.StringIO(), width=160)
    print_pair_pulls(pulls[scores[0]["id"]], console)
    text = console.file.getvalue()
    assert "ckpt 0 (x" in text and "ckpt 1 (x" in text and "p4 → the answer is is" in text and "not the thing" in text


def test_only_gradient_methods_have_validation_rows(small_run, scores):
    with pytest.raises(KeepsetError, match="single validation rows are known for rose, less, grad-cosine; here: rose"):
        pair_pulls(small_run, [scores[0]["id"]], "bm25")


def test_report_why_tells_every_kept_row(small_run, tmp_path, scores, pulls):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    write_why(run, console=Console(file=io.StringIO()))
    why = json.loads((run / "why.json").read_text())
    kept = {row["id"] for row in scores if row["selected"]}
    assert set(why) == {"davir", "rose"} and set(why["rose"]) == kept
    for id_ in kept:
        strongest = why["rose"][id_]["pairs"][0]
        assert strongest["value"] == pytest.approx(pulls[id_]["pairs"][0]["value"], abs=1e-4)
    davir = {row["id"]: row for row in pq.read_table(run / "scores/davir.parquet").to_pylist()}
    for id_, entry in why["davir"].items():
        assert sum(t[1] for t in entry["tokens"]) == pytest.approx(davir[id_]["loss_ini"], abs=0.02)
        assert sum(t[2] for t in entry["tokens"]) == pytest.approx(davir[id_]["loss_ref"], abs=0.02)
    page = build_payload(read_run(run))
    assert page["rows"]["why"]["rose"].keys() == kept
    (run / "why.json").unlink()
    (run / "work/records/why.json.json").unlink()
    (run / "why.json").write_text('{"rose": {"x": 3}, "nobody": {}, "davir": [], "bm25": {"y": {"pairs": "z"}}}')
    assert build_payload(read_run(run))["rows"]["why"] == {}


def test_without_models_there_is_nothing_to_tell(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    shutil.rmtree(run / "models/warmup")
    with pytest.raises(KeepsetError, match="no warm-up checkpoints here"):
        write_why(run, console=Console(file=io.StringIO()))
