"""What a run folder's files say as values: read and written again they are the same bytes; another form is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from keepset.errors import KeepsetError
from keepset.runfolder.files import json_text
from keepset.runfolder.records import Agreement, Comparison, Finding, Items, Point, StoredSubset, read_json
from keepset.runfolder.truth import Validation
from report_fixture import validation

MEAN = '{"value": 0.5, "low": 0.25, "high": null, "n": 8, "level": 0.95'
SIZE = '"budget": "5%", "n_rows": 3, "n_tokens": 18'
COMPARISON = f"""{{"rows": [
{{"label": "base", "kind": "base", "budget": null, "n_rows": 0, "n_tokens": 0, "seed": null, "metrics": {{}}}},
{{"label": "rose", "kind": "method", {SIZE}, "seed": 1, "metrics": {{"loss.chosen": {MEAN}}}}}}}],
"summary": [
{{"label": "rose", "kind": "method", {SIZE}, "seeds": 2, "metrics": {{"loss.chosen": {MEAN}, "spread": null}}}},
"vs_random": {{"loss.chosen": {{"difference": -0.5, "low": -1.0, "high": 0.0, "p": 0.5, "n": 8,
"win_tie_loss": [1, 6, 1], "p_holm": 1.0}}}},
"cost": {{"select_seconds": 0.0, "select_flops": 0, "train_seconds": 0.94, "train_flops": 8372224.0}}}}],
"full_training_flops": 37994496.0,
"selection": {{"flops": 2.0, "tokens": 7478, "seconds": 2.01, "share": null, "stages": [
{{"stage": "losses under the base", "methods": "davir", "rows": 13, "tokens": 462, "flops": 2.0, "seconds": 0.01}}]}},
"pareto": {{"loss.chosen": [{{"label": "base", "value": 1.0, "flops": 0.0, "seconds": 0.0, "front": true}}]}},
"loss_vs_performance": {{"models": [{{"loss": "loss.chosen", "metric": "gsm8k.accuracy", "n": 3, "spearman": -1.0,
"pearson": -0.5, "within": null}}], "epochs": []}}}}"""
POWER = """, "headline": "loss.chosen", "power": {"loss.chosen": {"n": 8, "sd": 0.5, "smallest": null}}}"""
VALIDATION = json.dumps(validation(left_out=("a", "b")))
FINDING = """{"name": "reference-held-out", "level": "info", "method": "", "figure": null, "text": "not measured",
"advice": "name evaluate.heldout"}"""
SUBSET = """{"name": "rose@5%", "label": "rose", "kind": "method", "budget": "5%", "n_tokens": 24, "pairs": 0,
"edge": {"chosen": ["a"], "left_out": [], "gap": 0.5, "share": 0.0}, "n_rows": 2, "file": "subsets/rose@5%.jsonl",
"sha256": "ab", "ids": ["a", "b"]}"""


AGREEMENT = """{"n": 5, "sizes": {"2": 2}, "chance": {"2": 0.4}, "scorings": {"recipe": {"mean": 0.5,
"length_spearman": null, "mean_tokens": 3.0, "mean_tokens_kept": {"2": 1.5}}},
"pairs": [{"a": "recipe", "b": "seed", "spearman": 0.8, "overlap": {"2": 1.0}}]}"""


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Comparison, COMPARISON), (Comparison, COMPARISON[:-1] + POWER), (Validation, VALIDATION),
     (Agreement, AGREEMENT), (Finding, FINDING), (StoredSubset, SUBSET),
     (Point, '{"model": "rose-seed0", "epoch": 1, "metrics": {"loss.chosen": 1.5, "gsm8k.accuracy": 0}}')],
)  # fmt: skip
def test_a_file_s_text_comes_back_as_it_was(kind, text):
    assert json_text(kind.from_json(json.loads(text), "x.json").to_json()) == json_text(json.loads(text))


def test_what_is_null_in_a_file_is_nan_or_none():
    found = Comparison.from_json(json.loads(COMPARISON), "comparison.json")
    assert math.isnan(found.rows[1].metrics["loss.chosen"].high)
    assert found.rows[0].budget is None and found.summary[0].metrics["loss.chosen"].spread is None
    assert found.summary[0].cost.flops == 8372224.0


def test_a_subset_without_an_edge_has_no_such_key():
    edge = StoredSubset.from_json(json.loads(SUBSET), "subsets.json")
    assert set(edge.to_json()) - set(replace(edge, edge=None).to_json()) == {"edge"}


def put(value, path, new):
    *way, last = path
    for step in way:
        value = value[step]
    if new is None:
        del value[last]
    else:
        value[last] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("summary",), None, "summary: Field required"),
        (("summary", 0, "cost", "train_flops"), None, "summary.0.cost.train_flops: Field required"),
        (("summary", 0, "kind"), "evil", "summary.0.kind: Input should be 'method'"),
        (("rows", 1, "metrics", "loss.chosen", "value"), "<b>", "rows.1.metrics.loss.chosen.value.int: .*integer"),
        (("rows", 1, "n_rows"), True, "rows.1.n_rows: .*integer"),
        (("rows",), 3, "rows: .*array"),
        (("pareto",), [], "pareto: .*object"),
    ],
)
def test_another_form_is_refused_by_its_place(path, new, message):
    value = json.loads(COMPARISON)
    put(value, path, new)
    whole = f"^run/comparison.json: not as this keepset writes it .{message}.*; delete it"
    with pytest.raises(KeepsetError, match=whole):
        Comparison.from_json(value, "run/comparison.json")


def test_items_are_the_file_s_arrays():
    arrays = {name: np.arange(3.0) for name in ("pair.chosen", "pair.of.of.a", "row.nll", "row.of.x", "gsm8k.correct")}
    items = Items.from_arrays(arrays)
    assert list(items.pairs) == ["chosen"] and list(items.tasks) == ["of.a"] and list(items.sources) == ["x"]
    assert list(items.rows) == ["nll"] and items.gsm8k is not None
    assert items.to_arrays().keys() == arrays.keys()
    assert Items.from_arrays({}).to_arrays() == {}


def test_the_files_of_a_run_come_back_as_the_same_bytes(small_run: Path):
    for name, kind in (("comparison.json", Comparison), ("findings.json", tuple[Finding, ...]),
                       ("subsets.json", dict[str, StoredSubset])):  # fmt: skip
        data = (small_run / name).read_bytes()
        found = read_json(kind, json.loads(data), name)
        written = (found.to_json() if isinstance(found, Comparison) else [f.to_json() for f in found]
                   if isinstance(found, tuple) else {n: s.to_json() for n, s in found.items()})  # fmt: skip
        assert (json_text(written, indent=1) + "\n").encode() == data
    files = list(small_run.glob("evaluation/*/items.safetensors"))
    assert len(files) == 5
    for file in files:
        assert save(dict(Items.from_arrays(load_file(file)).to_arrays())) == file.read_bytes()
