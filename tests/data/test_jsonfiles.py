"""JSON arrays and lines that are damaged, or larger than is held."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from data_rows import good, lines, write_rows
from keepset.data import load_pool


def test_line_separators_inside_strings_do_not_cut_lines(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be"
    row = {"instruction": odd, "output": odd}
    path = tmp_path / "x.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    path.write_bytes((text + "\n" + text.replace("a", "z") + "\n").encode())
    pool = load_pool(path)
    assert len(pool) == 2 and pool.table["line"].to_pylist() == [1, 2]
    assert pool.messages(0) == [{"role": "user", "content": odd}, {"role": "assistant", "content": odd}]


ARRAYS: dict[str, tuple[str, list[tuple[str, int]], list[int]]] = {
    # damage in an array of one row a line -> (code, line) of what is told, and the lines that are read
    "element is a number": ("[\n{0},\n7,\n{1}\n]", [("not-an-object", 3)], [2, 4]),
    "element is text": ('[\n{0},\n"x, ]",\n{1}\n]', [("not-an-object", 3)], [2, 4]),
    "element is no JSON": ("[\n{0},\nnonsense,\n{1}\n]", [("bad-json", 3)], [2, 4]),
    "element with a lost quote": ('[\n{0},\n{{"instruction: "a", "output": "b"}},\n{1}\n]', [("bad-json", 3)], [2, 4]),
    "element with a lost brace": ('[\n{0},\n{{"instruction": "a", "output": "b",\n{1}\n]', [("bad-json", 3)], [2, 4]),
    "element with a spare brace": ('[\n{0},\n{{"instruction": "a"}}}},\n{1}\n]', [("bad-json", 3)], [2, 4]),
    "element with an open string": ('[\n{0},\n{{"instruction": "a, "output": }},\n{1}\n]', [("bad-json", 3)], [2, 4]),
    "element twice a key": ('[\n{0},\n{{"a": 1, "a": 2}},\n{1}\n]', [("duplicate-key", 3)], [2, 4]),
    "no closing bracket": ("[\n{0},\n{1}\n", [("truncated-line", 4)], [2, 3]),
    "stops in an element": ('[\n{0},\n{1},\n{{"instruction": "a', [("truncated-line", 4)], [2, 3]),
    "something after the end": ("[\n{0},\n{1}\n]\n{{}}\n", [("trailing-data", 5)], [2, 3]),
    "two arrays": ("[\n{0}\n]\n[\n{1}\n]\n", [("trailing-data", 4)], [2]),
    "commas": ("[\n{0},,\n{1},\n]", [], [2, 3]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_array(tmp_path: Path, kind: str) -> None:
    text, told, kept = ARRAYS[kind]
    path = tmp_path / "x.json"
    path.write_text(text.format(*(line.decode() for line in lines("alpaca", 2))))
    pool = load_pool(path, allow_empty=True)
    assert [(q.reason, q.line) for q in pool.quarantine] == told
    assert pool.table["line"].to_pylist() == kept


def test_array_elements_beyond_the_buffer_and_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read 64 bytes at a time, as a slow pipe gives them; then with an element that is larger than is kept."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(64)

    class Stdin:
        buffer = Slow()

    monkeypatch.setattr("sys.stdin", Stdin)
    rows = [good("messages", k) | {"x": 'br{ack}[ets] and "quotes\\" ' * 3} for k in range(20)]
    Stdin.buffer = Slow(json.dumps(rows, indent=1).encode())
    want = load_pool(write_rows(tmp_path / "want.jsonl", rows))
    assert load_pool("-").ids.tolist() == want.ids.tolist()
    rows[7]["x"] = "y" * (2**20 + 5000)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, indent=1))
    monkeypatch.setattr("keepset.data.jsonfiles.MAX_ROW", 2000)
    pool = load_pool(path)
    assert [q.reason for q in pool.quarantine] == ["line-too-long"] and len(pool) >= 7
