"""`keepset validate` in a run folder that a recipe without `validate` made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from keepset.cli.work import validate
from keepset.errors import RecipeError

SETTINGS = ["validate.rows=6", "validate.models=3", "validate.again=0"]


def test_validate_adds_to_a_finished_folder_and_computes_nothing_of_it_again(small_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.suffix in (".parquet", ".safetensors")}
    costs = (run / "costs.jsonl").read_text()
    validate(run, settings=SETTINGS, quiet=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((run / "validation.json").read_text())
    assert {s["label"] for s in told["designs"][0]["scores"]} == {"davir", "rose", "bm25", "random-0"}
    assert {p: p.read_bytes() for p in before} == before
    added = (run / "costs.jsonl").read_text().removeprefix(costs)
    assert all("validation/" in json.loads(line)["stage"] for line in added.splitlines())
    assert yaml.safe_load((run / "recipe.yaml").read_text())["validate"]["models"] == 3
    validate(run, quiet=True)
    text = capsys.readouterr().out
    assert "3 trainings on random halves of 6 rows" in text and "random-0" in text
    assert (run / "costs.jsonl").read_text() == costs + added
    validate(run, dry_run=True, quiet=True)
    assert "validate: 3 random halves" in capsys.readouterr().out


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="is no run folder"):
        validate(tmp_path)
