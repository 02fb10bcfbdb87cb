"""The run folder as a dataset: the chosen rows as they came in, and a card whose numbers are the scores' own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("trl")

from keepset.data import load_pool


def test_the_dataset_is_the_chosen_rows_and_the_card_counts_them(small_run: Path) -> None:
    scores = pq.read_table(small_run / "scores/davir.parquet").to_pylist()
    kept = sorted((row for row in scores if row["selected"]), key=lambda row: row["rank"])
    path = small_run.parent / "pool.jsonl"
    pool = dict(zip(load_pool(path).ids, map(json.loads, path.read_text().splitlines()), strict=True))
    data = pq.read_table(small_run / "data/train-00000-of-00001.parquet").to_pylist()
    assert len(kept) == 3 and data == [pool[row["id"]] for row in kept]
    card = (small_run / "README.md").read_text()
    cells = dict(re.findall(r"^\| (read|scored|kept|quarantined)[^|]*(\|.*)$", card, flags=re.M))
    tokens = {name: sum(row["n_tokens"] for row in rows) for name, rows in (("scored", scores), ("kept", kept))}
    assert cells == {
        "read": "| 12 | |", "quarantined": "| 0 | |",
        "scored": f"| 12 | {tokens['scored']} |", "kept": f"| 3 | {tokens['kept']} |",
    }  # fmt: skip
    assert "# 3 of 12 rows, chosen by davir" in card and "data_files: scores/davir.parquet" in card
