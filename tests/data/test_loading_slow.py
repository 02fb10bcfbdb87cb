"""Long checks of the readers: 100,000 rows with mixed damage, memory, and every file of the shared data."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from data_rows import good
from keepset.data import FileRefused, load_pool, load_target

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize("n", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_percent_damage_leaves_the_clean_rows_and_their_scores(tmp_path: Path, n: int) -> None:
    """Every bad row is told with its line; the clean rows and their scores are those of the clean file, bit by bit."""
    drawn = random.Random(7)
    damage = {
        "bad-json": lambda line: line[:-7],
        "invalid-utf8": lambda line: line.replace(b"tag", b"t\xffg"),
        "nul-character": lambda line: line.replace(b"Question", rb"Que\u0000stion"),
        "lone-surrogate": lambda line: line.replace(b"Question", rb"\ud800uestion"),
        "duplicate-key": lambda line: line[:-1] + b', "output": "x"}',
        "nan-number": lambda line: line[:-1] + b', "x": NaN}',
        "empty-completion": lambda line: line.replace(b"It is", b"").replace(b"output", b'output": "", "x'),
        "missing-column": lambda line: line.replace(b"output", b"outptu"),
        "null-field": lambda line: b'{"instruction": "a", "output": null}',
        "not-an-object": lambda line: b"[" + line + b"]",
    }
    told, clean, dirty = {}, [], []
    for k in range(n):
        line = json.dumps(good("alpaca", k)).encode()
        if drawn.random() < 0.01:
            reason = drawn.choice(list(damage))
            told[k + 1] = reason
            dirty.append(damage[reason](line))
        else:
            clean.append(line)
            dirty.append(line)
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(clean) + b"\n")
    (tmp_path / "dirty.jsonl").write_bytes(b"\n".join(dirty) + b"\n")
    want, got = load_pool(tmp_path / "clean.jsonl"), load_pool(tmp_path / "dirty.jsonl")
    assert {q.line: q.reason for q in got.quarantine} == told and len(told) > n // 200
    assert got.n_in == n
    assert got.table.select(["id", "messages", "raw"]).equals(want.table.select(["id", "messages", "raw"]))
    clean_scores, dirty_scores = (scores_of(tmp_path, name) for name in ("clean", "dirty"))
    assert clean_scores.keys() == dirty_scores.keys()
    for label, table in clean_scores.items():
        assert dirty_scores[label].equals(table) and table["score"].null_count == 0, label


def scores_of(folder: Path, name: str) -> dict[str, pa.Table]:
    """Scores of a pool by the text methods and, by a tiny model, its losses."""
    pytest.importorskip("transformers")
    from rich.console import Console

    from conftest import save_tiny
    from keepset.methods.table import score
    from keepset.recipe import parse_recipe
    from keepset.stages.job import Job

    model = folder / "model"
    if not model.exists():
        save_tiny(model, max_position_embeddings=512)
        rows = "".join(json.dumps(good("alpaca", k)) + "\n" for k in range(5))
        (folder / "target.jsonl").write_text(rows)
    recipe = parse_recipe(
        {
            "run_dir": str(folder / f"run-{name}"), "model": {"model_name_or_path": str(model), "max_length": 400},
            "pool": [{"path": str(folder / f"{name}.jsonl"), "name": "pool"}], "target": str(folder / "target.jsonl"),
            "methods": ["random", "length", "bm25", "dsir", "perplexity"], "batching": {"token_budget": 8192},
        }
    )  # fmt: skip
    job = Job(recipe, console=Console(quiet=True))
    with job.run.lock():
        return {spec.label: score(job, spec) for spec in recipe.methods}


@pytest.mark.slow
def test_a_gigabyte_line_and_a_bomb_stay_within_512_megabytes(tmp_path: Path) -> None:
    """A line of 1 GB is quarantined, a 1 GB bomb is refused, and neither is ever held."""
    import gzip

    import zstandard

    row = json.dumps(good("alpaca", 1)).encode() + b"\n"
    with zstandard.ZstdCompressor(level=1).stream_writer(open(tmp_path / "bomb.jsonl.zst", "wb")) as out:
        for _ in range(1024):
            out.write(b" " * 2**20)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=6) as packed:
        for _ in range(512):
            packed.write(b"x" * 2**20)
    with open(tmp_path / "line.jsonl", "wb") as plain:
        plain.write(row + b'{"instruction": "')
        for _ in range(1024):
            plain.write(b"x" * 2**20)
        plain.write(b'"}\n' + row)
    code = """
import resource, sys
from keepset.data import load_pool
resource.setrlimit(resource.RLIMIT_DATA, (512 * 2**20, 512 * 2**20))
pool = load_pool(sys.argv[1] + "/line.jsonl")
print(len(pool), pool.quarantine[0].reason, pool.quarantine[0].line)
for name in ("bomb.jsonl.zst", "bomb.jsonl.gz"):
    try:
        load_pool(sys.argv[1] + "/" + name)
    except Exception as error:
        print(type(error).__name__, getattr(error, "reason", error))
# not ru_maxrss, which begins with the parent's memory
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024 < 512)
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split("\n")[:4] == [
        "2 line-too-long 2",
        "FileRefused archive-bomb",
        "FileRefused archive-bomb",
        "True",
    ]


#: file -> (dialect, rows, rows quarantined, copies) as a pool; None: its columns are no dialect of ours
EXPECTED: dict[str, tuple[str, int, int, int] | None] = {
    "alpaca/alpaca_union": ("alpaca", 16470, 8, 0),
    "alpaca_eval/instructions": None,
    "alpaca_eval/judge_preferences": None,
    "alpaca_eval/model_outputs": None,
    "alpaca_revised/train": ("preference", 2032, 25, 0),
    "alpaca_revised/valid": ("preference", 254, 3, 0),
    "autoj/pairwise_shared": None,
    "codealpaca/new_codealpaca": ("alpaca", 4535, 0, 0),
    "cot/flan_cot": None,
    "dolly/dolly_3k": ("alpaca", 2596, 0, 2),
    "dpo_en_demo/dpo_en_demo": ("llamafactory-preference", 300, 0, 5),
    "flan/p3_t0_train": ("prompt-completion", 15003, 0, 133),
    "gsm8k/test_first819": ("question-answer", 819, 0, 0),
    "gsm8k/train": ("question-answer", 7473, 0, 0),
    "hh_rlhf/harmless_base_test_first1312": ("hh-rlhf", 1312, 7, 0),
    "hhh_alignment/hhh": ("preference", 221, 0, 68),
    "oasst/en_100_trees": None,
    "oasst/pairs": ("preference", 417, 0, 210),
    "oasst/sft": ("messages", 207, 0, 0),
    "rose/shp_2_shot": ("preference", 36, 0, 0),
    "rose/shp_20_shot": ("preference", 360, 1, 0),
    "stack_exchange/meta-b": ("stack-exchange", 313, 9, 109),
}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("name", EXPECTED)
def test_real_files(name: str) -> None:
    want = EXPECTED[name]
    path = SHARED / f"{name}.jsonl.zst"
    if want is None:
        with pytest.raises(FileRefused, match="unknown-dialect"):
            load_pool(path)
        return
    pool = load_pool(path)
    assert (pool.dialect, pool.n_in, len(pool.quarantine), pool.duplicates) == want
    assert load_target(path).n_in == want[1]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_every_real_file_is_read_or_refused_in_one_line() -> None:
    files = sorted(SHARED.rglob("*.zst"))
    for path in files:
        for load in (load_pool, load_target):
            try:
                found = load(path)
            except FileRefused as refused:
                assert refused.reason == "unknown-dialect" and "\n" not in str(refused)
            else:
                assert found.n_in == len(found) + len(found.quarantine) and len(found)
    assert len(files) > 40


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_wrapped_rose_prompts_are_messages() -> None:
    target = load_target(SHARED / "rose" / "shp_2_shot.jsonl.zst")
    prompt, chosen, rejected = target.pair(0)
    assert [m["role"] for m in prompt] == ["user"] and "Human:" not in prompt[0]["content"]
    assert chosen[0]["content"] == chosen[0]["content"].strip() and rejected
    assert len(set(target.tasks)) == 18
