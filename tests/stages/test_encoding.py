"""Tokens on disk against tokens made in one go."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keepset.lazy import Lazy
from keepset.model.flops import count_tokens
from keepset.runfolder.execute import Task
from keepset.stages import encoding
from keepset.stages.encoded import encode_pool
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe, write_lines

ELSEWHERE = "import pickle, sys; pickle.load(sys.stdin.buffer)([1, 2])"


def sides_equal(one, other):
    return len(one) == len(other) and all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) and type(getattr(a, f.name)) is type(getattr(b, f.name))
        for a, b in zip(one, other, strict=True)
        for f in dataclasses.fields(a)
    )


def pool_file(path: Path, n=90, pairs=False):
    """Rows of many lengths, every ninth too long, every tenth with a faked turn, one a copy."""
    rows = []
    for i in range(n):
        text = f"answer {i} " + "word " * (i % 7) + ("long " * 400 if i % 9 == 4 else "")
        text += "<|im_end|>" if i % 10 == 3 else ""
        row = {"prompt": f"question {i}", "chosen": text}
        if pairs:
            row["rejected"] = "no " * (1 + i % 5)
        rows.append(row if pairs else {"instruction": row["prompt"], "input": "", "output": text})
    return write_lines(path, [*rows, rows[1]])


def made(tmp_path, model_folder, data, *, pairs=False, name="run", **changes):
    pool = {"path": str(pool_file(tmp_path / f"pool-{pairs}.jsonl", pairs=pairs)), "pairs": pairs}
    batching = {"shard_rows": 16, **changes.pop("batching", {})}
    return recipe(model_folder, data, tmp_path / name, pool=pool, batching=batching, **changes)


def shard_bytes(job):
    files = sorted((job.run.path / "work" / encoding.NAME).rglob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_quarantine_and_counts_are_those_of_one_pass(pairs, model_folder, data, tmp_path):
    job = Job(made(tmp_path, model_folder, data, pairs=pairs), console=quiet())
    want, refused = encode_pool(job.pool, job.encoder)
    kept = [i for i, row in enumerate(want) if row is not None]
    with job.run.lock():
        job.save_quarantine()
    assert 0 < len(refused) < len(want) and {reason for _, reason, _ in refused} >= {"special-token-in-text"}
    usable, sides = job.sides
    assert usable.tolist() == kept and isinstance(sides, Lazy)
    assert all(sides_equal(sides[k], want[i]) for k, i in enumerate(kept))
    assert all(
        sides_equal(one, want[kept[k]]) for k, one in zip([5, 0, 5], sides.take(np.array([5, 0, 5])), strict=True)
    )
    lines = [json.loads(line) for line in (job.run.path / "quarantine.jsonl").read_text().splitlines()]
    rows = job.pool.table.to_pylist()
    assert lines == [
        {"file": rows[i]["file"], "line": rows[i]["line"], "reason": reason, "detail": detail,
         "excerpt": rows[i]["raw"][:200], "id": rows[i]["id"]} for i, reason, detail in refused
    ]  # fmt: skip
    supervised = [sum(int(side.supervised.sum()) for side in want[i]) for i in kept]
    assert job.n_tokens().tolist() == supervised and job.n_tokens().dtype == np.int64
    views = ["chosen", "content", "alone", *(["rejected"] if pairs else [])]
    for what in views:  # counted from columns, and from the rows
        view = job.rows_of(what).tokens
        assert count_tokens(view) == count_tokens(list(view)) and view.counts() is not None
    for cut in (None, 3):
        job.recipe.gradients.max_completion_tokens = cut
        job._rows.clear()
        flat = [side for row in job.rows_of("gradients").tokens for side in row]
        counts = job.rows_of("gradients").tokens.counts()
        assert (counts[0].sum(), counts[1].sum()) == count_tokens(flat)


def test_a_killed_encoding_goes_on_and_other_processes_make_the_same_bytes(model_folder, data, tmp_path):
    first = Job(made(tmp_path, model_folder, data), console=quiet())
    with first.run.lock():
        whole = first.encoded
    before = shard_bytes(first)
    assert len(before) == 6 and len(whole) + whole.refused == 91
    folder = next((first.run.path / "work" / encoding.NAME).glob("*"))
    (folder / "00001.safetensors").unlink()
    (folder / "00002.safetensors").write_bytes(b"torn")
    task = Task(encoding.encode_shards, encoding.Encoding(encoding.canonical(first.recipe.model_dump(mode="json"))))
    subprocess.run([sys.executable, "-c", ELSEWHERE], input=pickle.dumps(task), check=True, capture_output=True)
    assert shard_bytes(first) == before
    (folder / "00004.json").unlink()
    again = Job(first.recipe, console=quiet())
    kept = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    with again.run.lock():
        assert again.n_tokens().tolist() == first.n_tokens().tolist()
    changed = {f.name for f in folder.glob("*.safetensors") if kept[f.name] != f.stat().st_mtime_ns}
    assert changed == {"00004.safetensors"} and shard_bytes(first) == before
    forks = Job(made(tmp_path, model_folder, data, name="forks", batching={"workers": 2}), console=quiet())
    with forks.run.lock():
        assert forks.n_tokens().tolist() == first.n_tokens().tolist()
    assert shard_bytes(forks) == before


def test_a_job_that_does_not_hold_the_folder_writes_no_tokens_into_it(model_folder, data, tmp_path):
    job = Job(made(tmp_path, model_folder, data), console=quiet())
    lengths = job.n_tokens()
    assert not (job.run.path / "work" / encoding.NAME).exists() and len(job.rows[3].input_ids) > 0
    held = Job(job.recipe, console=quiet())
    with held.run.lock():
        assert held.n_tokens().tolist() == lengths.tolist()
    there = shard_bytes(held)
    assert there
    third = Job(job.recipe, console=quiet())
    assert third.n_tokens().tolist() == lengths.tolist() and third.encoded._hold is None  # read where they lie


def test_a_flag_keeps_all_that_a_row_says_beside_its_tokens():
    from keepset.model.encode import Encoded

    for lost in encoding.LOST:
        for role in encoding.LEFT_OUT:
            for bits in range(8):
                row = Encoded(
                    np.zeros(1, np.int32),
                    np.zeros(1, bool),
                    bool(bits & 1),
                    (),
                    lost,
                    role,
                    bool(bits & 2),
                    bool(bits & 4),
                )
                assert dataclasses.replace(row, **encoding.from_flag(encoding.to_flag(row))) == row


def test_few_files_are_open_at_a_time(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "OPEN_SHARDS", 2)
    job = Job(made(tmp_path, model_folder, data), console=quiet())
    with job.run.lock():
        open_before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
        rows = list(job.rows)
    assert len(job.encoded._open) == 2
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= open_before + 2
    assert sum(len(row.input_ids) for row in rows) == count_tokens(job.rows)[0]


def test_a_worker_reads_the_pool_once_however_often_it_is_handed_a_shard(model_folder, data, tmp_path, monkeypatch):
    job = Job(made(tmp_path, model_folder, data), console=quiet())
    with job.run.lock():
        job.n_tokens()
    before, reads = shard_bytes(job), []
    for file in (job.run.path / "work" / encoding.NAME).rglob("*.safetensors"):
        file.unlink()
    read = encoding.load_pool
    monkeypatch.setattr(encoding, "load_pool", lambda *a, **k: reads.append(1) or read(*a, **k))
    monkeypatch.setattr(encoding, "OPEN", {})
    own = encoding.Encoding(encoding.canonical(job.recipe.model_dump(mode="json")))
    for number in range(len(before)):
        encoding.encode_shards(own, [number])
    assert len(before) > 2 and len(reads) == 1 and shard_bytes(job) == before
