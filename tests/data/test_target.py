"""The target: shots, length matching, tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from data_rows import write_rows
from keepset.data import FileRefused, load_target
from keepset.recipe import DataSpec


def spec(path: Path, **more: Any) -> DataSpec:
    return DataSpec.model_validate({"path": str(path)} | more)


def pairs(tasks: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"task": task, "prompt": f"{task} {k}", "chosen": "a" * (10 + k), "rejected": "b" * (10 + 2 * k)}
        for task, n in tasks.items()
        for k in range(n)
    ]


def test_shots_are_nested_drawn_by_seed_and_blind_to_order(tmp_path: Path) -> None:
    rows = pairs({"x": 12, "y": 12, "z": 3})
    path = write_rows(tmp_path / "p.jsonl", rows)
    by_n = {n: load_target(spec(path, shots=n), seed=5) for n in range(1, 14)}
    for n in range(1, 13):
        for task in "xyz":
            few, more = (by_n[m].ids[by_n[m].tasks == task].tolist() for m in (n, n + 1))
            assert more[: len(few)] == few and len(few) == min(n, 3 if task == "z" else 12)
    assert by_n[2].left_out == {"shots": 27 - 6} and by_n[2].n_in == 27
    assert set(by_n[13].ids) == set(load_target(path).ids)
    random.Random(1).shuffle(rows)
    again = load_target(spec(write_rows(tmp_path / "q.jsonl", rows), shots=4), seed=5)
    assert {t: again.ids[again.tasks == t].tolist() for t in "xyz"} == {
        t: by_n[4].ids[by_n[4].tasks == t].tolist() for t in "xyz"
    }
    assert again.fingerprint() == by_n[4].fingerprint()
    assert len({tuple(sorted(load_target(spec(path, shots=4), seed=s).ids)) for s in range(8)}) > 5


def test_every_pair_is_drawn_equally_often(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", pairs({"x": 8}))
    counts = dict.fromkeys(load_target(path).ids, 0)
    for seed in range(200):
        for i in load_target(spec(path, shots=2), seed=seed).ids:
            counts[i] += 1
    assert 25 < min(counts.values()) and max(counts.values()) < 80  # 50 expected, standard deviation 6


def test_length_matched_keeps_pairs_within_a_fifth(tmp_path: Path) -> None:
    sizes = [(100, 100), (100, 80), (100, 79), (79, 100), (80, 100), (10, 100)]
    rows = [{"prompt": f"q{k}", "chosen": "a" * a, "rejected": "b" * b} for k, (a, b) in enumerate(sizes)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    target = load_target(spec(path, length_matched=True))
    assert [target.pair(i)[0][0]["content"] for i in range(len(target))] == ["q0", "q1", "q4"]
    assert target.left_out == {"length_matched": 3} and target.n_in == 6
    few = load_target(spec(path, length_matched=True, shots=2))
    assert len(few) == 2 and set(few.ids) <= set(target.ids)
    with pytest.raises(FileRefused, match="length_matched left out every pair"):
        load_target(spec(write_rows(tmp_path / "q.jsonl", rows[-1:]), length_matched=True))


def test_tasks(tmp_path: Path) -> None:
    rows = pairs({"x": 2})
    rows[1]["task"] = None
    rows.append({"prompt": "p", "chosen": "a", "rejected": "b", "task": 7})
    path = write_rows(tmp_path / "p.jsonl", rows)
    assert load_target(path).tasks.tolist() == ["x", "p", "7"]
    assert load_target(spec(path, name="given")).tasks.tolist() == ["x", "given", "7"]
