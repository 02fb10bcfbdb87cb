"""DPO on the target's own pairs, without a selection, as a control of the comparison."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("trl")

from keepset.errors import RecipeError
from keepset.pipeline import run_recipe
from keepset.recipe import parse_recipe
from keepset.stages.counts import final_work
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe, write_lines

CONTROLS = {"random_seeds": [0], "longest": False, "dpo_direct": True}


def test_it_is_trained_evaluated_and_compared_at_no_price(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["bm25"], controls=CONTROLS)
    table = quiet()
    run_recipe(made, console=quiet(), out=table)
    assert "dpo-direct" in table.file.getvalue()
    found = json.loads((tmp_path / "comparison.json").read_text())
    entry = next(e for e in found["summary"] if e["kind"] == "dpo-direct")
    assert entry["n_rows"] == 6 and entry["n_tokens"] > 6 and entry["vs_random"]
    assert entry["cost"]["select_flops"] == 0 and entry["cost"]["train_flops"] > 0
    margins = {e["label"]: e["metrics"]["margin.implicit_mean"]["value"] for e in found["summary"]}
    assert margins["dpo-direct"] != margins["bm25"]
    meta = json.loads((tmp_path / "models/dpo-direct-seed0/done.json").read_text())
    assert meta["inputs"]["args"]["loss"] == "dpo"
    logged = [e["flops"] for e in Job(made, console=quiet()).run.costs() if "dpo-direct" in e["stage"] and "flops" in e]
    counted = [w.flops for w in final_work(Job(made, console=quiet())) if w.methods == "dpo-direct"]
    assert sum(counted) == pytest.approx(sum(logged))
    again = quiet()
    run_recipe(made, console=again, out=quiet())
    assert "dpo-direct: trained before, kept" in again.file.getvalue()


def test_a_target_without_pairs_and_a_method_of_its_name_are_refused(model_folder, data, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q the", "completion": "answer is"}])
    made = recipe(model_folder, data, tmp_path / "run", methods=["random"], controls=CONTROLS, target=rows)
    with pytest.raises(RecipeError, match="dpo_direct needs pairs"):
        run_recipe(made, console=quiet(), out=quiet())
    with pytest.raises(RecipeError, match="control's name"):
        parse_recipe({"pool": "p", "methods": [{"name": "rose", "label": "dpo-direct"}]})


def test_dpo_moves_the_margin_of_its_pairs(model_folder, data, tmp_path):
    """Trained on the pairs it is evaluated on, their margin rises."""
    target = data["target"]
    strong = {"num_train_epochs": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    made = recipe(
        model_folder, data, tmp_path, methods=["random"], controls=CONTROLS, train=strong,
        evaluate={"pairs": [{"path": target}], "bootstrap": 100},
    )  # fmt: skip
    run_recipe(made, console=quiet(), out=quiet())
    found = json.loads((tmp_path / "comparison.json").read_text())
    margin = {e["label"]: e["metrics"]["margin.implicit_mean"]["value"] for e in found["summary"]}
    others = [v for k, v in margin.items() if k != "dpo-direct"]
    assert margin["dpo-direct"] > 0 and margin["dpo-direct"] > max(np.abs(others))
