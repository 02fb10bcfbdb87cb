"""Fuzzing of everything that opens files of other hands: `python tests/fuzz/fuzz.py TARGET [libFuzzer options]`.

A target takes arbitrary bytes and must end normally or with the error it documents; anything else is a finding.
Run by `make fuzz`; not collected by pytest.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["keepset", "yaml"]):
    from keepset.data import load_pool, load_target
    from keepset.data.dialects import as_pair, as_sft, detect
    from keepset.data.reasons import RowProblem
    from keepset.errors import KeepsetError, ModelError
    from keepset.recipe import load_recipe
    from keepset.runfolder.files import digest
    from keepset.runfolder.run import Run
    from keepset.runfolder.shards import read_shard

MEMORY = Path("/dev/shm")
FOLDER = Path(tempfile.mkdtemp(prefix="keepset-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
KEYS = (
    "messages conversations conversation prompt completion response instruction input output question answer query "
    "text chosen rejected history system from value role content tools tool_calls score_A score_B labels human_ref_A "
    "human_ref_B images"
).split()
WORDS = "user assistant human gpt system tool function a".split() + ["", " ", "\n\nHuman: a\n\nAssistant: b"]
PREFIXES = [
    b"", b'{"instruction": "a", "output": "', b'[{"messages": [{"role": "', b"prompt,completion\n", b"\x1f\x8b",
    b"(\xb5/\xfd", b"PAR1", b"ARROW1", b"\xef\xbb\xbf", b"\xff\xfe",
]  # fmt: skip


def jsonl(data: bytes) -> None:
    """A pool file of any content: every row is read or quarantined, or the file is refused."""
    path = FOLDER / "pool.jsonl"
    start = PREFIXES[data[0] % len(PREFIXES)] if data else b""
    path.write_bytes(start + data[1:])
    for load in (load_pool, load_target):
        try:
            found = load(str(path), allow_empty=True)
        except KeepsetError as error:
            assert "\n" not in str(error)
            continue
        for entry in found.quarantine:
            assert entry.reason and entry.line >= 0 and len(entry.excerpt) <= 200
        assert len(set(found.ids)) == len(found) if load is load_pool else True


def dialects(data: bytes) -> None:
    """A row of any shape under the keys that dialects look for."""
    given = atheris.FuzzedDataProvider(data)

    def value(depth: int) -> Any:
        kind = given.ConsumeIntInRange(0, 9 if depth < 4 else 5)
        if kind <= 1:
            return WORDS[given.ConsumeIntInRange(0, len(WORDS) - 1)]
        if kind == 2:
            return given.ConsumeUnicodeNoSurrogates(12)
        if kind == 3:
            return given.ConsumeInt(8)
        if kind == 4:
            return [None, True, False, 1.5, float("inf")][given.ConsumeIntInRange(0, 4)]
        if kind == 5:
            return given.ConsumeUnicode(6)
        if kind <= 7:
            return [value(depth + 1) for _ in range(given.ConsumeIntInRange(0, 3))]
        return {key(): value(depth + 1) for _ in range(given.ConsumeIntInRange(0, 4))}

    def key() -> str:
        return KEYS[given.ConsumeIntInRange(0, len(KEYS) - 1)]

    row = {key(): value(0) for _ in range(given.ConsumeIntInRange(1, 5))}
    for pairs_first in (False, True):
        dialect = detect(row, pairs_first=pairs_first)
        for convert in (as_sft, as_pair) if dialect else ():
            try:
                convert(dialect)(row)  # type: ignore[operator]
            except RowProblem as problem:
                assert problem.reason and "\n" not in problem.detail


def recipe(data: bytes) -> None:
    """A recipe file of any content."""
    path = FOLDER / "recipe.yaml"
    head = b"pool: a.jsonl\nmethods: [random]\n" if data[:1] < b"\x80" else b""
    path.write_bytes(head + data[1:])
    try:
        load_recipe(path)
    except KeepsetError as error:
        assert "\n" not in str(error)


def shard(data: bytes) -> None:
    """A shard with a record that fits its bytes, a record of any content, and a run folder's JSON files."""
    folder = FOLDER / "run" / "work"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000.safetensors").write_bytes(data)
    (folder / "00000.json").write_text(json.dumps({"sha256": digest(data), "ids": "x", "rows": 1}))
    read_shard(folder, 0, "x")
    (folder / "00000.json").write_bytes(data)
    assert read_shard(folder, 0, "x") is None
    run = Run(FOLDER / "run")
    for name in ("subsets.json", "costs.jsonl", "recipe.yaml", "models/a/done.json", "scores/a.parquet"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(data)
    (run.path / "work/records").mkdir(exist_ok=True)
    (run.path / "work/records/comparison.json.json").write_bytes(data)
    (run.path / "comparison.json").write_bytes(b"{}")
    assert run.done("models/a") is None or data.startswith((b"{", b" ", b"\n", b"\t", b"\r"))
    calls: list[Callable[[], Any]] = [
        run.costs, run.recipe, run.recipe_data, lambda: run.load_json("subsets.json"),
        lambda: run.load_json("comparison.json"), lambda: run.load_table("scores/a.parquet"),
        lambda: run.require_whole("models/a"),
    ]  # fmt: skip
    for call in calls:
        try:
            call()
        except KeepsetError as error:
            assert "\n" not in str(error)


def header(data: bytes) -> None:
    """Headers of safetensors (Adam's moments) and npy files."""
    from keepset.features.adam import load_adam

    path = FOLDER / "adam.safetensors"
    split = min(len(data), 64)
    text = b'{"__metadata__":{"adam":"' + data[:split].replace(b'"', b"'").replace(b"\\", b"/") + b'"},' + data[split:]
    for content in (data, len(data).to_bytes(8, "little") + data, len(text).to_bytes(8, "little") + text):
        path.write_bytes(content)
        try:
            load_adam(path)
        except ModelError as error:
            assert "\n" not in str(error)
    array = FOLDER / "x.npy"
    array.write_bytes(b"\x93NUMPY\x01\x00" + data)
    try:
        load_pool(str(array), allow_empty=True)
    except KeepsetError as error:
        assert "\n" not in str(error)


def seeds(name: str) -> list[bytes]:
    """Sound inputs to start from."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save

    if name == "jsonl":
        rows = [{"instruction": "a", "input": "", "output": "b"}, {"messages": [{"role": "user", "content": "x"}]},
                {"prompt": "p", "chosen": "c", "rejected": "r", "n": 1.5e3}]  # fmt: skip
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), sink)
        return [
            b"\0" + lines,
            b"\0[" + lines.replace(b"\n", b",") + b"{}]",
            b"\3a,b\n",
            b"\0" + sink.getvalue().to_pybytes(),
        ]
    if name == "recipe":
        return [
            b"\0budget: [5%, 200000 tokens]\nwarmup: {fraction: 0.1}\nmodel: {model_name_or_path: demo}\n",
            b"\xffpool: [{path: a, name: b}]\nmethods: [{name: rose, options: {map: sgd}}]\nseed: 2001-01-01\n",
        ]
    if name == "shard":
        files = {"a.json": digest(b"{}")}
        record = {"key": "k", "facts": {}, "files": files, "stage": "s", "seconds": 1, "sha256": "", "ids": "x"}
        return [save({"nll": np.ones(3), "v": np.ones((2, 2), np.float32)}), json.dumps(record).encode()]
    if name == "header":
        arrays = {f"{kind}.a.weight": np.ones((2, 2), np.float32) for kind in ("exp_avg", "exp_avg_sq")}
        whole = save(arrays, metadata={"adam": json.dumps({"step": 3, "betas": [0.9, 0.999], "eps": 1e-8})})
        return [whole, whole[8:]]
    return []


TARGETS = {f.__name__: f for f in (jsonl, dialects, recipe, shard, header)}

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    chosen = TARGETS[sys.argv.pop(1)]
    if chosen is header:
        import keepset.features.adam  # noqa: F401 - torch is imported before the clock starts
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(chosen.__name__)):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], chosen)
    atheris.Fuzz()
