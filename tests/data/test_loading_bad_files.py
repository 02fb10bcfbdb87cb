"""Bad files: refused as a whole with one line, or read as far as they are sound with the damage told."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_rows import good, jsonl, lines, write_lines, write_rows
from keepset.data import FileRefused, load_pool, load_target
from keepset.errors import DataError
from keepset.recipe import DataSpec

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.jsonl", b"", "empty-file"),
    "only blank lines": ("x.jsonl", b"\n \n\r\n\t\n", "empty-file"),
    "only a byte-order mark": ("x.jsonl", b"\xef\xbb\xbf", "empty-file"),
    "empty array": ("x.json", b"[]", "empty-file"),
    "empty gzip": ("x.jsonl.gz", gzip.compress(b""), "empty-file"),
    "empty zstd": ("x.jsonl.zst", zstandard.compress(b""), "empty-file"),
    "UTF-16": ("x.jsonl", jsonl().decode().encode("utf-16"), "utf-16"),
    "UTF-16 big endian without a mark": ("x.jsonl", jsonl().decode().encode("utf-16-be"), "utf-16"),
    "UTF-16 little endian without a mark": ("x.jsonl", jsonl().decode().encode("utf-16-le"), "utf-16"),
    "UTF-32": ("x.jsonl", jsonl().decode().encode("utf-32"), "utf-16"),
    "UTF-16 CSV": ("x.csv", "instruction,output\na,b\n".encode("utf-16"), "utf-16"),
    "UTF-16 in gzip": ("x.jsonl.gz", gzip.compress(jsonl().decode().encode("utf-16")), "utf-16"),
    "not gzip": ("x.jsonl.gz", b"hello, this is not gzip", "not-gzip"),
    "not zstd": ("x.jsonl.zst", b"hello, this is not zstd", "not-zstd"),
    "not Parquet": ("x.parquet", b"hello, this is not parquet", "not-parquet"),
    "not Arrow": ("x.arrow", b"hello, this is not arrow", "not-arrow"),
    "gzip header only": ("x.jsonl.gz", gzip.compress(jsonl())[:10], "not-gzip"),
    "pickle": ("x.jsonl", pickle.dumps([{"instruction": "a", "output": "b"}], protocol=4), "unknown-container"),
    "zip": ("x.jsonl", b"PK\x03\x04" + b"\0" * 40, "unknown-container"),
    "xz": ("x.jsonl.xz", b"\xfd7zXZ\0\0\0", "unknown-container"),
    "NumPy": ("x.npy", b"\x93NUMPY\x01\0", "unknown-container"),
    "SQLite": ("x.db", b"SQLite format 3\0" + b"\0" * 40, "unknown-container"),
    "Parquet without its footer": ("x.parquet", b"PAR1" + b"\0" * 200, "corrupt-parquet"),
    "Arrow without a schema": ("x.arrow", b"ARROW1\0\0" + b"\0" * 20, "corrupt-arrow"),
    "columns of no dialect": ("x.jsonl", b'{"a": 1, "b": 2}\n', "unknown-dialect"),
    "answers only": ("x.jsonl", b'{"output": "x"}\n{"output": "y"}\n', "unknown-dialect"),
    "CSV header only blank names": ("x.csv", b"instruction,,output\na,b,c\n", "no-header"),
    "CSV header repeated names": ("x.csv", b"output,output\na,b\n", "no-header"),
    "CSV header not UTF-8": ("x.csv", b"instruct\xffion,output\na,b\n", "no-header"),
    "CSV header with NUL": ("x.csv", b"instruction,output,x\0\na,b,c\n", "no-header"),
    "CSV of a header alone": ("x.csv", b"instruction,output\n", "empty-file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_as_a_whole(tmp_path: Path, kind: str) -> None:
    name, content, reason = REFUSED[kind]
    path = tmp_path / name
    path.write_bytes(content)
    for load in (load_pool, load_target):
        with pytest.raises(FileRefused) as stop:
            load(path, allow_empty=True)
        assert stop.value.reason == reason
        told = str(stop.value)
        assert told.startswith(str(path)) and told.endswith(f"[{reason}]") and "\n" not in told


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for protocol in range(2, 6):
        path = tmp_path / "x.jsonl"
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(FileRefused, match="pickle"):
            load_pool(path)
    assert not (tmp_path / "ran").exists()


SAME: dict[str, tuple[str, bytes]] = {
    "plain": ("x.jsonl", jsonl()),
    "byte-order mark": ("x.jsonl", b"\xef\xbb\xbf" + jsonl()),
    "CRLF": ("x.jsonl", jsonl().replace(b"\n", b"\r\n")),
    "blank lines": ("x.jsonl", b"\n\n" + jsonl().replace(b"\n", b"\n \n")),
    "no line break at the end": ("x.jsonl", jsonl().rstrip()),
    "array in .jsonl": ("x.jsonl", b"[" + b",".join(lines("alpaca")) + b"]"),
    "array of lines": ("x.json", b"[\n" + b",\n".join(lines("alpaca")) + b"\n]\n"),
    "indented array": ("x.json", json.dumps([good("alpaca", k) for k in range(5)], indent=2).encode()),
    "array with a byte-order mark": ("x.json", b"\xef\xbb\xbf\n[" + b" , ".join(lines("alpaca")) + b"]"),
    "lines in .json": ("x.json", jsonl()),
    "indented objects": (
        "x.json",
        b"\n".join(json.dumps(good("alpaca", k), indent=4).encode() for k in range(5)),
    ),
    "plain text called .gz": ("x.jsonl.gz", jsonl()),
    "plain text called .zst": ("x.jsonl.zst", jsonl()),
    "gzip called .jsonl": ("x.jsonl", gzip.compress(jsonl())),
    "zstd called .json": ("x.json", zstandard.compress(jsonl())),
    "two gzip members": ("x.jsonl.gz", gzip.compress(jsonl()[:100]) + gzip.compress(jsonl()[100:])),
    "two zstd frames": ("x.jsonl.zst", zstandard.compress(jsonl()[:100]) + zstandard.compress(jsonl()[100:])),
    "no suffix": ("x", jsonl()),
}


@pytest.mark.parametrize("kind", SAME)
def test_read_the_same(tmp_path: Path, kind: str) -> None:
    name, content = SAME[kind]
    want = load_pool(write_lines(tmp_path / "want.jsonl", lines("alpaca")))
    path = tmp_path / name
    path.write_bytes(content)
    pool = load_pool(path)
    assert pool.ids.tolist() == want.ids.tolist() and not pool.quarantine
    assert pool.table["raw"].to_pylist() == want.table["raw"].to_pylist()
    if kind in ("blank lines",):
        assert pool.table["line"].to_pylist() == [3, 5, 7, 9, 11]
    if kind in ("array of lines",):
        assert pool.table["line"].to_pylist() == [2, 3, 4, 5, 6]
    if kind == "indented array":
        assert pool.table["line"].to_pylist() == [2, 8, 14, 20, 26]


def test_sections(tmp_path: Path) -> None:
    """format forces, limit counts rows read, category and task columns are told when they are not there."""
    rows = [good("alpaca", k) | {"kind": "math" if k % 2 else None, "text": f"t{k}"} for k in range(6)]
    rows[1]["output"] = ""
    path = str(write_rows(tmp_path / "x.jsonl", rows))

    def spec(**more: Any) -> DataSpec:
        return DataSpec.model_validate({"path": path} | more)

    assert load_pool(spec(format="text")).messages(0) == [{"role": "text", "content": "t0"}]
    limited = load_pool(spec(limit=3))
    assert (len(limited), limited.n_in) == (2, 3)
    assert load_pool(spec(category_column="kind")).categories().tolist() == [None, None, "math", None, "math"]
    with pytest.raises(DataError, match=r"category_column 'kin' is no column.*did you mean 'kind'"):
        load_pool(spec(category_column="kin"))
    with pytest.raises(DataError, match="task_column 'nope' is no column"):
        load_target(spec(task_column="nope"))
    with pytest.raises(DataError, match=r"format 'alpacca' is not known \(did you mean 'alpaca'\?\)"):
        load_pool(spec(format="alpacca"))
    assert set(load_target(spec(task_column="kind")).tasks) == {"x", "math"}


def test_a_bad_first_row_does_not_decide_the_dialect(tmp_path: Path) -> None:
    rows = [{"text": "stray"}, {"x": 1}, *[good("alpaca", k) for k in range(5)]]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    assert pool.dialect == "alpaca" and len(pool) == 5
    assert [(q.line, q.reason) for q in pool.quarantine] == [(1, "missing-column"), (2, "missing-column")]


PLACED = {
    "two unnamed columns": (
        "x.csv",
        b",,instruction,output\n0,0,a,b\n",
        r":1: of 4 columns those at 1, 2 have no name",
    ),
    "an unnamed last column": ("x.csv", b"instruction,output,\na,b,\n", r"columns those at 3 have no name: name them"),
    "a name twice": ("x.csv", b"instruction,output,output\na,b,c\n", "two columns are named 'output'; rename one"),
    "Excel's first line": ("x.csv", b"sep=,\ninstruction,output\na,b\n", "Excel's `sep=`: take it out"),
    "capitals": ("x.csv", b"Instruction, output\na,b\n", "as alpaca they must be written instruction, output, or"),
    "semicolons": ("x.csv", b"instruction;output\na;b\n", r"divided by ';', not by ','.*read_csv\(OLD, sep=';'\)"),
    "tabs": ("x.csv", b"instruction\toutput\na\tb\n", "divided by a tab, not by ',': name the file .tsv"),
    "commas": ("x.tsv", b"instruction,output\na,b\n", "divided by ',', not by a tab: name the file .csv"),
    "UTF-16 CSV": ("x.csv", "instruction,output\na,b\n".encode("utf-16"), "UTF-16; convert it: iconv -f UTF-16 -t"),
    "UTF-16 without BOM": ("x.jsonl", jsonl().decode().encode("utf-16-le"), "the text is UTF-16; convert it: iconv"),
    "UTF-32": ("x.jsonl", jsonl().decode().encode("utf-32"), "the text is UTF-32; convert it: iconv -f UTF-32 -t"),
    "old Mac": ("x.jsonl", jsonl().replace(b"\n", b"\r"), r"lines end in CR alone \(old Mac\): convert them: tr"),
    "BOM between values": (
        "x.jsonl",
        b'{"text": "a"}\xef\xbb\xbf{"text": "b"}\n',
        "a byte-order mark: two files were put",
    ),
    "two arrays": ("x.json", b'[\n{"text": "a"}]\n\xef\xbb\xbf[{"text": "b"}]', "put together, give each by itself"),
    "other header after a BOM": (
        "x.csv",
        b"instruction,output\na,b\n\xef\xbb\xbfoutput,instruction\nc,d\n",
        r":3: a byte-order mark and other columns stand here: files were put together; give each by itself",
    ),
}


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_cause_and_remedy_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, message = PLACED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileRefused, match=message) as caught:
        load_pool(tmp_path / name, strict=True)
    assert "\n" not in str(caught.value)
