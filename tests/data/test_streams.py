"""Containers and standard input: archives cut short, bombs, byte-order marks, what can't be read."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard

from data_rows import good, jsonl, lines
from keepset.data import FileRefused, load_pool


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_archive_cut_short_keeps_the_rows_before(tmp_path: Path, packed: str) -> None:
    import random

    drawn = random.Random(0)
    rows = [json.dumps(good("alpaca", k) | {"x": drawn.random()}).encode() for k in range(60_000)]
    content = b"\n".join(rows)
    data = gzip.compress(content, 1) if packed == "gz" else zstandard.compress(content)
    path = tmp_path / f"x.jsonl.{packed}"
    path.write_bytes(data[: len(data) * 3 // 4])
    pool = load_pool(path)
    assert 30_000 < len(pool) < 60_000
    assert [(q.reason, q.line) for q in pool.quarantine] == [("truncated-archive", len(pool) + 1)]
    with pytest.raises(FileRefused, match="truncated-archive"):
        load_pool(path, strict=True)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_bomb(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepset.data.streams.BOMB_BYTES", 4 * 2**20)
    monkeypatch.setattr("keepset.data.streams.BOMB_RATIO", 100)
    line = lines("alpaca", 1)[0] + b"\n"
    content = line * (40 * 2**20 // len(line))
    path = tmp_path / f"x.jsonl.{packed}"
    path.write_bytes(gzip.compress(content, 9) if packed == "gz" else zstandard.compress(content, 3))
    with pytest.raises(FileRefused, match="unpacks to more than") as stop:
        load_pool(path)
    assert stop.value.reason == "archive-bomb"


@pytest.mark.parametrize(
    "content", [jsonl(), gzip.compress(jsonl()), zstandard.compress(jsonl()), b"instruction,output\na,b\n"]
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    class Stdin:
        buffer = io.BytesIO(content)

    monkeypatch.setattr("sys.stdin", Stdin)
    pool = load_pool("-")
    assert len(pool) in (1, 5) and set(pool.sources()) == {"stdin"}
    assert set(pool.table["file"].to_pylist()) == {"<stdin>"}


def test_standard_input_cannot_be_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"PAR1....")

    monkeypatch.setattr("sys.stdin", Stdin)
    with pytest.raises(FileRefused, match="parquet can't be read from standard input"):
        load_pool("-")


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="can't be read|no such file"):
        load_pool("\0")
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(FileRefused):
        load_pool(loop)


def test_files_with_a_byte_order_mark_put_together(tmp_path: Path) -> None:
    """`cat a b`: every row is read, under its own line, and comes back without the mark."""
    mark = b"\xef\xbb\xbf"
    lines = [json.dumps({"instruction": f"q{k}", "output": "\ufeffa"}) for k in range(4)]
    halves = [("\n".join(lines[:2]) + "\n").encode(), ("\n".join(lines[2:]) + "\n").encode()]
    (tmp_path / "a.jsonl").write_bytes(mark + mark + halves[0] + mark + halves[1] + mark)
    table = [f'q{k},"\ufeffa\n\ufeffb"\r\n'.encode() for k in range(4)]  # inside a cell it is the cell's own
    header = b'"instruction",output\r\n'
    (tmp_path / "a.csv").write_bytes(mark + header + b"".join(table[:2]) + mark + header + b"".join(table[2:]))
    spread = json.dumps({"instruction": "q", "output": "a"}, indent=1).encode()
    (tmp_path / "a.json").write_bytes(mark + spread + b"\n" + mark + spread + b"\n")
    pool = load_pool(tmp_path / "a.jsonl", strict=True)
    assert pool.table["raw"].to_pylist() == lines and pool.table["line"].to_pylist() == [1, 2, 3, 4]
    pool = load_pool(tmp_path / "a.csv", strict=True)
    assert [m[1]["content"] for m in pool.all_messages()] == ["\ufeffa\n\ufeffb"] * 4
    assert pool.table["line"].to_pylist() == [2, 4, 7, 9]
    assert len(load_pool(tmp_path / "a.json", strict=True)) == 2
