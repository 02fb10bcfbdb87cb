"""Findings about scores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from keepset.pipeline.findings import diagnose_machines, diagnose_scores
from keepset.runfolder.shards import Shards, read_machine


@pytest.mark.parametrize(
    ("sign", "level", "advice"),
    [(1, "warning", "`longest` control"), (-1, "warning", "controls.shortest"), (0, "info", "no strong")],
)  # fmt: skip
def test_a_tie_to_length_names_the_control_for_its_direction(sign, level, advice):
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 100, 40)
    score = sign * n_tokens + rng.normal(size=40)
    ids = [f"{i:02d}" for i in range(40)]
    table = pa.table({"id": ids, "score": score, "n_tokens": n_tokens, "source": ["a"] * 40})
    finding = next(f for f in diagnose_scores(table, "m") if f.name == "length-correlation")
    assert finding.level == level and advice in finding.advice
    assert np.sign(finding.figure) == sign or sign == 0


def test_shards_of_different_machines_are_a_finding_and_those_that_do_not_say_are_none(tmp_path):
    ids = np.array([f"{i:02d}" for i in range(9)])

    def shards(device):
        machine = None if device is None else lambda: {"device": device, "torch": "2"}
        return Shards(tmp_path, {"losses": {"k": 1}}, ids, 3, machine=machine)

    for number, device in enumerate([None, "H100", "H100"]):
        shards(device).write(number, {"losses": {"x": np.arange(3.0) + number}})
    assert diagnose_machines(tmp_path) == []
    assert read_machine(shards(None).place("losses"), 0) is None
    whole = {p.name: p.read_bytes() for p in shards(None).place("losses").glob("*.safetensors")}

    shards("A100").write(1, {"losses": {"x": np.arange(3.0) + 1}})
    (finding,) = diagnose_machines(tmp_path)
    assert (finding.name, finding.level, finding.figure) == ("mixed-machines", "warning", 2)
    assert "1 shards: device A100, torch 2" in finding.text and "1 shards: device H100" in finding.text
    assert whole == {p.name: p.read_bytes() for p in shards(None).place("losses").glob("*.safetensors")}
    assert shards(None).gather()["losses"]["x"].tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 4]


@pytest.mark.parametrize(("what", "other"), [("device", "cuda"), ("dtype", "bfloat16"), ("transformers", "4.1")])
def test_a_run_names_the_stage_whose_shards_were_made_otherwise_until_they_are_made_again(
    tiny_run, tmp_path, what, other
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run_dir, run)
    (stage,) = run.glob("work/losses-base/*")
    path = stage / "00001.json"
    record = json.loads(path.read_text())
    assert set(record["machine"]) == {"device", "dtype", "keepset", "numpy", "torch", "transformers"}
    record["machine"][what] = other
    path.write_text(json.dumps(record))

    def mixed():
        assert tiny_run.resumed(run) == []
        return [f for f in json.loads((run / "findings.json").read_text()) if f["name"] == "mixed-machines"]

    (finding,) = mixed()
    assert finding["level"] == "warning" and f"{what} {other}" in finding["text"]
    shutil.rmtree(stage)  # as its advice says
    assert mixed() == []
