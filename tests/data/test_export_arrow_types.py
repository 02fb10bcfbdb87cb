"""Property: what Parquet and Arrow files hold comes back from Parquet; as JSON Lines it is valid and is read again."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import logging
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepset.data import load_pool, write_subset
from keepset.errors import DataError

FLAT = {
    pa.null(): st.none(),
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-128, 127),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float16(): st.sampled_from([0.5, -2.0, math.nan, math.inf]),
    pa.float32(): st.floats(width=32),
    pa.float64(): st.floats(),
    pa.string(): st.text('aé\n"\\\u2028😀', max_size=4),
    pa.large_string(): st.text("NaN, Infinity", max_size=12),
    pa.string_view(): st.text(max_size=20).filter(lambda s: "\0" not in s),
    pa.binary(): st.binary(max_size=20),
    pa.large_binary(): st.binary(max_size=20),
    pa.binary_view(): st.binary(max_size=20),
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.decimal32(7, 2): st.integers(-(10**6), 10**6).map(lambda n: decimal.Decimal(n).scaleb(-2)),
    pa.decimal128(38, 5): st.integers(-(10**30), 10**30).map(lambda n: decimal.Decimal(f"{n}e-5")),
    pa.decimal256(60, 0): st.integers(-(10**50), 10**50).map(decimal.Decimal),
    pa.date32(): st.dates(),
    pa.timestamp("ms"): st.integers(-(2**62), 2**62),  # most of them in years that Python doesn't know
    pa.timestamp("us", "Europe/Paris"): st.integers(0, 2**50),
    pa.timestamp("ns", "+05:30"): st.integers(-(2**62), 2**62),
    pa.time32("ms"): st.integers(0, 86_399_999),
    pa.time64("ns"): st.integers(0, 86_399_999_999_999),
    pa.duration("us"): st.integers(-(2**63), 2**63 - 1),
    pa.duration("ns"): st.integers(-(2**62), 2**62),
    pa.dictionary(pa.int32(), pa.string()): st.sampled_from("uvw"),
    pa.dictionary(pa.int8(), pa.int64()): st.sampled_from([1, 2**40]),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]): st.fixed_dictionaries(
        {"bytes": st.none() | st.binary(max_size=4), "path": st.none() | st.just("a.png")}
    ),
}


def nested(kind: pa.DataType, values: st.SearchStrategy) -> st.SearchStrategy:
    """One more level around a type, with a strategy of its values."""
    some = st.none() | values
    few = st.lists(some, max_size=3)
    return st.sampled_from(
        [
            (pa.list_(kind), few),
            (pa.large_list(kind), few),
            (pa.list_view(kind), few),
            (pa.list_(kind, 2), st.lists(some, min_size=2, max_size=2)),
            (
                pa.struct([("a", kind), ("b", pa.int32())]),
                st.fixed_dictionaries({"a": some, "b": st.none() | st.just(7)}),
            ),
            (pa.map_(pa.string(), kind), st.lists(st.tuples(st.sampled_from("xyz"), some), max_size=2)),
        ]
    )


flat = st.sampled_from(sorted(FLAT.items(), key=str))
kinds = st.recursive(flat, lambda inner: inner.flatmap(lambda both: nested(*both)), max_leaves=3)


@st.composite
def columns(draw: st.DrawFn) -> pa.Array:
    """Draw five values of one type, nulls among them."""
    kind, values = draw(kinds)
    return pa.array(draw(st.lists(st.none() | values, min_size=5, max_size=5)), kind)


def pool_of(folder: Path, column: pa.Array, suffix: str = "parquet") -> Path:
    path = folder / f"in.{suffix}"
    table = pa.table({"x": column, "instruction": [f"q{k}" for k in range(5)], "output": ["a"] * 5})
    table = table.replace_schema_metadata({"huggingface": "{}"})
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def no_constant(word: str) -> None:
    raise AssertionError(f"not JSON: {word}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(column=columns())
def test_parquet_comes_back_and_json_lines_are_json(tmp_path: Path, column: pa.Array) -> None:
    pool = load_pool(pool_of(tmp_path, column))
    assert len(pool) == 5, pool.quarantine
    chosen = [4, 0, 3, 3]
    write_subset(pool, chosen, tmp_path / "out.parquet")
    before, after = pq.read_table(tmp_path / "in.parquet"), pq.read_table(tmp_path / "out.parquet")
    assert after.schema.equals(before.schema, check_metadata=True)
    assert _shown(after, [0, 1, 2, 3]) == _shown(before, chosen)
    for name in ("out.jsonl", "out.json.gz", "out.csv"):
        write_subset(pool, range(5), tmp_path / name)
        again = load_pool(tmp_path / name)
        assert again.ids.tolist() == pool.ids.tolist()
    for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]:
        json.loads(line, parse_constant=no_constant)
    # and what was written from JSON can go to Parquet and back, too
    write_subset(again, range(5), tmp_path / "second.parquet")
    assert load_pool(tmp_path / "second.parquet").ids.tolist() == pool.ids.tolist()


def _shown(table: pa.Table, rows: list[int]) -> list[str]:
    """Each value as Arrow prints it: unlike Python it knows every time, and NaN is the same as NaN."""
    return [table.slice(k, 1)[name].to_string(element_size_limit=10_000) for k in rows for name in table.column_names]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(column=columns())
def test_arrow_files_come_back_too(tmp_path: Path, column: pa.Array) -> None:
    """Parquet has no seconds and no date64, so the values are held against what Parquet makes of the file itself."""
    pool = load_pool(pool_of(tmp_path, column, "arrow"))
    write_subset(pool, [4, 1], tmp_path / "out.parquet")
    pq.write_table(pa.ipc.open_file(str(tmp_path / "in.arrow")).read_all(), tmp_path / "plain.parquet")
    before, after = pq.read_table(tmp_path / "plain.parquet"), pq.read_table(tmp_path / "out.parquet")
    assert after.schema.equals(before.schema, check_metadata=True)
    assert _shown(after, [0, 1]) == _shown(before, [4, 1])


def test_what_json_has_no_word_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = {"bytes": b"\x00\xff", "path": "a.png"}
    kind = pa.struct([("score", pa.float32()), ("big", pa.uint64()), ("image", pa.list_(pa.binary()))])
    row = {"score": math.nan, "big": 2**63, "image": [b"\x01", None]}
    column = pa.array([row, {**row, "score": 0.5, "big": 2**63 - 1}, None, row, row], kind)
    table = pq.read_table(pool_of(tmp_path, column)).append_column("picture", pa.array([image] * 5))
    table = table.append_column("loss", pa.array([0.5, -math.inf, math.nan, None, 1.5]))
    pq.write_table(table, tmp_path / "in.parquet")
    write_subset(load_pool(tmp_path / "in.parquet"), range(5), tmp_path / "out.jsonl")
    rows = [json.loads(line, parse_constant=no_constant) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == [0.5, None, None, None, 1.5]
    assert rows[0]["x"] == {"score": None, "big": "9223372036854775808", "image": ["AQ==", None]}
    assert rows[1]["x"] == {"score": 0.5, "big": 2**63 - 1, "image": ["AQ==", None]} and rows[2]["x"] is None
    assert base64.b64decode(rows[0]["picture"]["bytes"]) == image["bytes"] and rows[0]["picture"]["path"] == "a.png"
    said = [record.message.partition(": ")[2] for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        "values of 'x' 3, 'loss' 2 are NaN or infinite, which JSON has no word for: written as null (.parquet keeps "
        "them)",
        "values of 'x' 3 are beyond signed 64 bits, which JSON readers change: written as text (.parquet keeps them)",
        "bytes of 'x', 'picture' are written as base64 text (.parquet keeps them)",
    ]
    assert load_pool(tmp_path / "out.jsonl").quarantine == ()


def test_rows_without_such_numbers_keep_their_bytes(tmp_path: Path) -> None:
    line = (
        '{"instruction":"NaN, Infinity 1234567890123456789",  "output": "x", "f": 0.12345678901234567890123, "n": 1E2}'
    )
    (tmp_path / "in.jsonl").write_text(line + "\n")
    write_subset(load_pool(tmp_path / "in.jsonl"), [0], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == line + "\n"


def test_a_file_that_changed_after_it_was_read_is_refused(tmp_path: Path) -> None:
    path = pool_of(tmp_path, pa.array([1, 2, 3, 4, 5]))
    pool = load_pool(path)
    pool_of(tmp_path, pa.array([1, 2, 3, 9, 5]))
    write_subset(pool, [0, 1], tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"in\.parquet:4: the file has changed"):
        write_subset(pool, [0, 3], tmp_path / "again.parquet")
    pq.write_table(pq.read_table(path).slice(0, 2), path)
    with pytest.raises(DataError, match=r"in\.parquet:5: the file has changed"):
        write_subset(pool, [4], tmp_path / "again.parquet")
    assert not (tmp_path / "again.parquet").exists() and not list(tmp_path.glob("*.part"))


def test_files_with_other_columns_are_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column that one file lacks is null there; a column of two types can't be joined, and that is said."""
    paths = []
    extra: list[dict[str, Any]] = [
        {"x": pa.array([b"a"] * 5)},
        {"day": pa.array([datetime.date(2024, 5, 6)] * 5)},
        {"x": pa.array([1] * 5)},
    ]
    for k, more in enumerate(extra):
        (tmp_path / str(k)).mkdir()
        path = pool_of(tmp_path / str(k), pa.array([0] * 5))
        columns = {"instruction": [f"{k} {n}" for n in range(5)], "output": ["b"] * 5}
        pq.write_table(pa.table(columns | more), path)
        paths.append(str(path))
    write_subset(load_pool(paths[:2]), [5, 0], tmp_path / "joined.parquet")
    joined = pq.read_table(tmp_path / "joined.parquet")
    assert joined.schema.field("x").type == pa.binary() and joined.schema.field("day").type == pa.date32()
    assert joined["x"].to_pylist() == [None, b"a"] and joined["day"].to_pylist() == [datetime.date(2024, 5, 6), None]
    assert not caplog.records
    write_subset(load_pool(paths), [0, 10], tmp_path / "mixed.parquet")
    assert pq.read_table(tmp_path / "mixed.parquet")["x"].to_pylist() == ['"YQ=="', "1"]
    assert "columns of other types" in caplog.text and "'x' mixes types" in caplog.text


def test_what_parquet_has_no_type_for_is_written_as_in_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    column = pa.array([(1, 2, 3)] * 5, pa.month_day_nano_interval())
    write_subset(load_pool(pool_of(tmp_path, column, "arrow")), [1], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == [[1, 2, 3]]
    assert "column 'x': Parquet has no month_day_nano_interval" in caplog.text
    rows = '{"instruction": "a", "output": "b", "x": {}, "y": [{}]}\n'
    (tmp_path / "in.jsonl").write_text(rows)
    write_subset(load_pool(tmp_path / "in.jsonl"), [0], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").select(["x", "y"]).to_pylist() == [{"x": "{}", "y": "[{}]"}]


def test_times_that_python_does_not_know_are_whole_in_json(tmp_path: Path) -> None:
    columns = {
        "ns": pa.array([1, 86_399_999_999_999], pa.time64("ns")),
        "in": pa.array([[{"t": 1}], None], pa.list_(pa.struct([("t", pa.time64("ns"))]))),
        "far": pa.array([[0, 2**48], [1000]], pa.list_(pa.timestamp("ms"))),
        "instruction": ["a", "b"],
        "output": ["c", "d"],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    rows = [json.loads(text) for text in load_pool(tmp_path / "in.parquet").table["raw"].to_pylist()]
    assert [r["ns"] for r in rows] == ["00:00:00.000000001", "23:59:59.999999999"]
    assert rows[0]["in"] == [{"t": "00:00:00.000000001"}] and rows[1]["in"] is None
    assert rows[0]["far"] == ["1970-01-01 00:00:00.000", "10889-08-02 05:31:50.656"]
    assert rows[1]["far"] == ["1970-01-01T00:00:01"]
