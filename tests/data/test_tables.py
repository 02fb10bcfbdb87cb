"""CSV, Parquet and Arrow: bad rows, cut and damaged files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import good, parquet
from keepset.data import FileRefused, load_pool, write_subset
from keepset.errors import DataError


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("cut", ["parquet", "arrow"])
def test_table_cut_short(tmp_path: Path, cut: str, keep: float) -> None:
    table = pa.Table.from_pylist([good("alpaca", k) for k in range(3000)])
    path = tmp_path / f"x.{cut}"
    if cut == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(FileRefused) as stop:
        load_pool(path)
    assert stop.value.reason == f"corrupt-{cut}"


def test_flipped_bytes_inside_parquet_are_refused_or_told(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [good("alpaca", k) for k in range(500)])
    content = bytearray(path.read_bytes())
    outcomes = set()
    for at in range(4, len(content) - 8, max(1, len(content) // 60)):
        broken = content.copy()
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            pool = load_pool(path, allow_empty=True)
            assert pool.n_in == len(pool) + len(pool.quarantine)
            outcomes.add("read")
        except DataError as stop:
            assert "\n" not in str(stop)
            outcomes.add("refused")
    assert "refused" in outcomes


CSVS: dict[str, tuple[bytes, list[tuple[str, int]], int]] = {
    "sound": (b"instruction,output\na,b\nc,d\n", [], 2),
    "CRLF": (b"instruction,output\r\na,b\r\nc,d\r\n", [], 2),
    "byte-order mark": (b"\xef\xbb\xbfinstruction,output\na,b\n", [], 1),
    "line breaks in quotes": (b'instruction,output\n"a\nb","c\n\nd"\ne,f\n', [], 2),
    "blank lines": (b"instruction,output\n\na,b\n\n\nc,d\n", [], 2),
    "a field too few": (b"instruction,output\na,b\nc\ne,f\n", [("csv-columns", 3)], 2),
    "a field too many": (b"instruction,output\na,b\nc,d,e\ne,f\n", [("csv-columns", 3)], 2),
    "text after a quote": (b'instruction,output\na,b\n"c"x,d\ne,f\n', [("csv-quotes", 3)], 2),
    "invalid UTF-8": (b"instruction,output\na,b\nc\xff,d\ne,f\n", [("invalid-utf8", 3)], 2),
    "NUL": (b"instruction,output\na,b\nc\0,d\ne,f\n", [("nul-character", 3)], 2),
    "empty answer": (b"instruction,output\na,b\nc,\ne,f\n", [("empty-completion", 3)], 2),
    "empty question": (b"instruction,output\na,b\n,d\ne,f\n", [("empty-prompt", 3)], 2),
    "quotes left open": (b'instruction,output\na,b\n"c,d\ne,f\n', [("csv-quotes", 3)], 1),
}


@pytest.mark.parametrize("kind", CSVS)
def test_csv(tmp_path: Path, kind: str) -> None:
    content, told, kept = CSVS[kind]
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    pool = load_pool(path)
    assert [(q.reason, q.line) for q in pool.quarantine] == told
    assert len(pool) == kept and pool.files[0].container == "csv"
    if kind == "line breaks in quotes":
        assert pool.messages(0)[1]["content"] == "c\n\nd" and pool.table["line"].to_pylist() == [2, 6]


def test_csv_cells_of_chats_are_json(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    bad = ['[{"role": "user"', "[1]", '[{"role": "user", "role": "a"}]']
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["messages"])
        writer.writerow([json.dumps(good("messages", 1)["messages"])])
        writer.writerows([cell] for cell in bad)
    pool = load_pool(path)
    assert pool.messages(0) == good("messages", 1)["messages"]
    assert [(q.line, q.reason) for q in pool.quarantine] == [(3, "wrong-type"), (4, "wrong-type"), (5, "duplicate-key")]


PARQUET: dict[str, tuple[dict[str, Any], str]] = {
    "null answer": ({"output": None}, "null-field"),
    "empty answer": ({"output": ""}, "empty-completion"),
    "blank instruction": ({"instruction": "  ", "input": ""}, "empty-prompt"),
    "NUL": ({"output": "a\0b"}, "nul-character"),
}


@pytest.mark.parametrize("container", ["parquet", "arrow", "saved"])
@pytest.mark.parametrize("kind", PARQUET)
def test_bad_rows_of_tables(tmp_path: Path, kind: str, container: str) -> None:
    change, reason = PARQUET[kind]
    rows = [good("alpaca", k) for k in range(5)]
    rows[2] |= change
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "x"
    file = path
    if container == "parquet":
        pq.write_table(table, path)
    else:
        if container == "saved":
            path.mkdir()
            file = path / "data-00000-of-00001.arrow"
            (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
        else:
            file = path = tmp_path / "x.arrow"
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    pool = load_pool(path)
    assert [(q.reason, q.line, q.file) for q in pool.quarantine] == [(reason, 3, str(file))]
    assert pool.table["line"].to_pylist() == [1, 2, 4, 5]


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b\xff", b"c"], pa.binary())
    bad = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    pq.write_table(pa.table({"instruction": ["x", "y", "z"], "output": bad}), tmp_path / "x.parquet")
    pool = load_pool(tmp_path / "x.parquet")
    assert len(pool) == 2 and [(q.reason, q.line) for q in pool.quarantine] == [("invalid-utf8", 2)]


def test_an_index_column_of_pandas(tmp_path: Path) -> None:
    content = b",instruction,input,output\n0,a,,b\n1,c,,d\n"
    (tmp_path / "a.csv").write_bytes(content)
    pool = load_pool(tmp_path / "a.csv", strict=True)
    assert len(pool) == 2
    for name in ("b.csv", "b.jsonl", "b.parquet"):
        write_subset(pool, [0, 1], tmp_path / name)
        assert load_pool(tmp_path / name).ids.tolist() == pool.ids.tolist()
    assert (tmp_path / "b.csv").read_bytes() == content


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_line_ends_of_csv(tmp_path: Path, ending: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(ending.join([b"instruction,output", b'a,"b', b'c"', b"d,e", b""]))
    pool = load_pool(tmp_path / "a.csv", strict=True)
    assert [m[1]["content"] for m in pool.all_messages()] == ["b" + ending.decode() + "c", "e"]
    write_subset(pool, [0, 1], tmp_path / "b.csv")
    again = load_pool(tmp_path / "b.csv", strict=True)
    assert again.table["raw"].to_pylist() == pool.table["raw"].to_pylist()
