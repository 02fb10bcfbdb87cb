"""Content ids, copies, fingerprints, shots, length matching, leaks."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_rows import good, write_rows
from keepset.data import FileRefused, find_leaks, load_pool, load_target
from keepset.data.columns import canonical
from keepset.recipe import DataSpec


def spec(path: Path, **more: Any) -> DataSpec:
    return DataSpec.model_validate({"path": str(path)} | more)


def test_an_id_is_the_start_of_sha256_over_canonical_json(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": 'é "x"\n\u2028\x7f/\\'}, {"role": "assistant", "content": "a"}]}
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [row]))
    content = [[m["role"], m["content"]] for m in row["messages"]]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    assert pool.ids[0] == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert canonical([(m["role"], m["content"]) for m in row["messages"]]) == text
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    sides = [[["user", "q"]], [["assistant", "a"]], [["assistant", "b"]]]
    text = json.dumps(sides, separators=(",", ":"))
    target = load_target(write_rows(tmp_path / "y.jsonl", [pair]))
    assert target.ids[0] == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_known_id(tmp_path: Path) -> None:
    """Ids are written into run folders: they must never change."""
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "Say hi.", "input": "", "output": "Hi."}])
    assert load_pool(path).ids[0] == "f2dc179d7d9efe351f49221f7c4e0cf0"


def test_ids_do_not_depend_on_dialect_container_order_split_or_name(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": f"a{k}"}] for k in range(20)]
    one = write_rows(tmp_path / "one.jsonl", [{"messages": c} for c in chats])
    mixed = [{"instruction": c[0]["content"], "output": c[1]["content"], "n": k} for k, c in enumerate(chats)]
    random.Random(0).shuffle(mixed)
    a, b = write_rows(tmp_path / "a.jsonl", mixed[:7]), write_rows(tmp_path / "b.jsonl", mixed[7:])
    whole, parts = load_pool(one), load_pool([spec(b, name="other"), spec(a)])
    assert sorted(whole.ids) == sorted(parts.ids) and len(set(whole.ids)) == 20
    assert whole.fingerprint() == parts.fingerprint()
    assert whole.fingerprint() != whole.take(range(19)).fingerprint()
    assert list(parts.sources()) == ["other"] * 13 + ["a"] * 7


def test_copies_are_counted_and_numbered(tmp_path: Path) -> None:
    rows = [good("alpaca", k) for k in (0, 1, 0, 2, 0, 1)]
    for k, row in enumerate(rows):
        row["tag"] = k  # other columns play no part
    path = write_rows(tmp_path / "x.jsonl", rows)
    pool = load_pool([path, path])
    first = {k: load_pool(write_rows(tmp_path / "y.jsonl", [good("alpaca", k)])).ids[0] for k in range(3)}
    suffixes = [(0, ""), (1, ""), (0, "-1"), (2, ""), (0, "-2"), (1, "-1")]
    suffixes += [(0, "-3"), (1, "-2"), (0, "-4"), (2, "-1"), (0, "-5"), (1, "-3")]
    assert pool.ids.tolist() == [first[k] + s for k, s in suffixes]
    assert pool.duplicates == 9 and len(set(pool.ids)) == 12
    assert load_target(path).duplicates == 3


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "train.jsonl", [good("alpaca", ord(folder))])
    pool = load_pool([str(tmp_path / "a" / "train.jsonl"), str(tmp_path / "b" / "train.jsonl")])
    assert list(pool.sources()) == ["a/train", "b/train"]


def test_take_keeps_order_and_content(tmp_path: Path) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [good("messages", k) for k in range(9)]))
    part = pool.take(np.array([7, 2, 2]))
    assert part.ids.tolist() == [pool.ids[7], pool.ids[2], pool.ids[2]]
    assert part.messages(0) == pool.messages(7) and len(part) == 3


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


def test_reading_imports_no_torch_and_ids_do_not_depend_on_the_process(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [good("sharegpt", k) for k in range(5)])
    code = (
        "import sys; from keepset.data import load_pool; p = load_pool(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); print(p.fingerprint())"
    )
    seen = set()
    for seed, zone in (("0", "UTC"), ("1", "Asia/Tokyo")):
        environment = {"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(  # the interpreter that runs the tests
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, check=True
        )
        seen.add(done.stdout.strip())
    assert seen == {load_pool(path).fingerprint()}
