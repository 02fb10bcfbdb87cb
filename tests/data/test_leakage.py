"""Rows of the evaluation that are in the pool."""

from __future__ import annotations

from pathlib import Path

from data_rows import write_rows
from keepset.data import find_leaks, load_pool, load_target


def test_exact_leaks(tmp_path: Path) -> None:
    long = "An answer that is long enough to be evidence."
    pool = load_pool(
        write_rows(
            tmp_path / "pool.jsonl",
            [
                {"instruction": "The  QUESTION", "output": long.upper()},
                {"instruction": "the question", "output": "Another answer."},
                {"instruction": "Something else", "output": long},
                {"instruction": "Something else", "output": "Yes."},
                {"messages": None, "instruction": "Clean", "output": "Clean answer, nobody's but ours."},
            ],
        )
    )
    target = load_target(
        write_rows(tmp_path / "t.jsonl", [{"prompt": "The question", "chosen": long, "rejected": "Yes."}])
    )
    assert find_leaks(pool, target).tolist() == ["row", "prompt", "answer", "", ""]
