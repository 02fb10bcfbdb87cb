"""The same bytes whatever the hash seed, locale and time zone; the same scores however the input files are cut."""

from __future__ import annotations

import json
import os
import random

import pyarrow.parquet as pq
import yaml

from crash import Server, outcome

WORLD = {
    "PYTHONHASHSEED": "1", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    "LANGUAGE": "tr", "COLUMNS": "30", "HOME": "/nonexistent",
}  # fmt: skip


def test_hash_seed_locale_and_time_zone_change_no_byte(tiny_run, tmp_path, monkeypatch):
    """Another interpreter, in which text is ASCII unless a program says otherwise."""
    assert os.environ.get("PYTHONHASHSEED") != WORLD["PYTHONHASHSEED"]
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    server = Server(tmp_path)
    try:
        done = server.run(tiny_run.recipe, tmp_path / "run")
    finally:
        server.close()
    assert done["exit"] == 0, done["log"]
    assert outcome(tmp_path / "run") == tiny_run.outcome


def test_how_the_pool_is_cut_into_files_changes_no_score(tiny_run, tmp_path):
    """One file; three files, gzipped or JSON, rows shuffled: scores, ranks, choices and weights by id are equal."""
    import gzip

    recipe = yaml.safe_load(tiny_run.recipe.read_text())
    rows = [json.loads(line) for line in open(recipe["pool"], encoding="utf-8")]
    random.Random(3).shuffle(rows)
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "b.json").write_text(json.dumps(rows[3:11]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[11:]).encode()))
    recipe["pool"] = [{"path": str(tmp_path / n), "name": "pool"} for n in ("c.jsonl.gz", "a.jsonl", "b.json")]
    recipe["evaluate"]["pairs"] = []
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = tiny_run.server.run(tmp_path / "recipe.yaml", tmp_path / "run")
    assert done["exit"] == 0, done["log"]
    for label in ("rose", "davir", "random-0"):
        one, cut = (
            {row.pop("id"): row for row in pq.read_table(run / f"scores/{label}.parquet").to_pylist()}
            for run in (tiny_run.run_dir, tmp_path / "run")
        )
        assert one == cut and list(one) != list(cut)  # every column, bit by bit
        chosen = [sorted((run / f"subsets/{label}.jsonl").read_text().splitlines()) for run in
                  (tiny_run.run_dir, tmp_path / "run")]  # fmt: skip
        assert [json.loads(x) for x in chosen[0]] == [json.loads(x) for x in chosen[1]]
    for name in ("models/reference", "models/warmup/checkpoint-4"):
        weights = [
            (run / name / "adapter_model.safetensors").read_bytes() for run in (tiny_run.run_dir, tmp_path / "run")
        ]
        assert weights[0] == weights[1]
