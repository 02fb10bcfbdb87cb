"""Rows out again: every container and dialect gives back what came in, and other tools open it."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import ALL, SFT, good, write_rows
from keepset.data import load_pool, row_texts, rows_table, write_parquet, write_subset
from keepset.data.export import with_number
from keepset.data.export_parquet import pool_table
from keepset.errors import DataError

CONTAINERS = [".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson", ".parquet"]


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_own_dialect_in_every_container(tmp_path: Path, dialect: str, suffix: str) -> None:
    rows = [good(dialect, k) for k in range(6)]
    pool = load_pool(write_rows(tmp_path / "in.jsonl", rows))
    out = tmp_path / f"out{suffix}"
    write_subset(pool, [4, 0, 3], out)
    again = load_pool(out)
    assert again.ids.tolist() == pool.ids[[4, 0, 3]].tolist()
    assert [json.loads(t) for t in again.table["raw"].to_pylist()] == [rows[4], rows[0], rows[3]]
    assert list(json.loads(again.table["raw"][0].as_py())) == list(rows[4])  # the order of columns too
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("dialect", ["messages", "sharegpt", "alpaca", "prompt-completion-chat", "preference", "text"])
def test_csv(tmp_path: Path, dialect: str, suffix: str) -> None:
    rows = [good(dialect, k) | {"note": 'a "b",\nc\t;', "none": None} for k in range(4)]
    pool = load_pool(write_rows(tmp_path / "in.jsonl", rows))
    write_subset(pool, range(4), tmp_path / f"out{suffix}")
    again = load_pool(tmp_path / f"out{suffix}")
    assert again.ids.tolist() == pool.ids.tolist()
    row = json.loads(again.table["raw"][2].as_py())
    assert (row["tag"], row["note"], row["none"]) == ("2", 'a "b",\nc\t;', "")


def test_jsonl_comes_back_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        '{"instruction":"a" , "output":"\\u00e9\\ud83d\\ude00", "x": 1.50, "y": 1E5}',
        '{"output": "z", "instruction": "b", "id": 12345678901234567}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    write_subset(load_pool(tmp_path / "in.jsonl"), [0, 1], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes()


@pytest.mark.parametrize("container", ["parquet", "arrow", "json", "csv", "jsonl"])
def test_a_name_without_suffix_gets_the_container_of_the_input(tmp_path: Path, container: str) -> None:
    rows = [good("alpaca", k) for k in range(3)]
    path = tmp_path / f"in.{container}"
    table = pa.Table.from_pylist(rows)
    if container == "parquet":
        pq.write_table(table, path)
    elif container == "arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        write_subset(load_pool(write_rows(tmp_path / "rows.jsonl", rows)), range(3), path)
    pool = load_pool(path)
    write_subset(pool, [2, 1], tmp_path / "subset")
    again = load_pool(tmp_path / "subset")
    assert again.ids.tolist() == pool.ids[[2, 1]].tolist()
    assert again.files[0].container == {"arrow": "parquet", "json": "jsonl"}.get(container, container)
    assert container != "json" or (tmp_path / "subset").read_bytes()[:1] == b"["


def test_parquet_types_survive(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)
    table = pa.table(
        {
            "instruction": ["a", "b", "c"],
            "output": pa.array(["x", "y", "z"], pa.large_string()),
            "when": pa.array([day, None, day], pa.timestamp("us")),
            "day": pa.array([day.date()] * 3, pa.date32()),
            "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")], pa.decimal128(8, 2)),
            "blob": pa.array([b"\x00\xff", None, b""], pa.binary()),
            "small": pa.array([1, 2, None], pa.int8()),
            "score": pa.array([0.5, float("nan"), None], pa.float32()),
            "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
            "list": pa.array([[1], [], None], pa.list_(pa.int16())),
        }
    ).replace_schema_metadata({"huggingface": '{"info": {}}'})
    pq.write_table(table, tmp_path / "in.parquet")
    pool = load_pool(tmp_path / "in.parquet")
    write_subset(pool, [2, 0], tmp_path / "out.parquet")
    again = pq.read_table(tmp_path / "out.parquet")
    assert again.schema.equals(pq.read_table(tmp_path / "in.parquet").schema, check_metadata=True)
    assert again.to_pylist() == table.take([2, 0]).to_pylist()


def test_what_datasets_cannot_open_is_text_where_it_must_open_it(tmp_path: Path) -> None:
    """RUN/data is for `load_dataset`, which has no maps (5.0); a subset keeps them."""
    datasets = pytest.importorskip("datasets")
    column = pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))
    deep = pa.StructArray.from_arrays([column], ["m"])
    table = pa.table({"instruction": ["q", "r"], "output": ["a", "b"], "m": column, "deep": deep, "n": [1, 2]})
    pq.write_table(table, tmp_path / "in.parquet")
    pool = load_pool(tmp_path / "in.parquet")
    assert pool_table(pool).equals(table)
    pq.write_table(pool_table(pool, for_datasets=True), tmp_path / "out.parquet")
    read = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read[0] == {"instruction": "q", "output": "a", "m": '[["a", 1]]', "deep": '{"m": [["a", 1]]}', "n": 1}


def test_keys_that_only_some_objects_have_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [good("alpaca", k) | {"meta": {f"k{k}": k}, "same": {"a": [k]}} for k in range(2)]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    write_subset(pool, [0, 1], tmp_path / "out.parquet")
    told = "column 'meta': objects get null for keys that only others have (.jsonl keeps them)"
    assert caplog.messages == [told]
    assert pq.read_table(tmp_path / "out.parquet")["meta"].to_pylist() == [{"k0": 0, "k1": None}, {"k0": None, "k1": 1}]


def test_an_image_column_beside_text_comes_back(tmp_path: Path) -> None:
    """Rows without a picture are used, whatever empty form it has, and are the file's own rows in Parquet."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [None, {"bytes": b"\x89PNG\xff", "path": None}, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}]
    prompts = ["a", "b", "c", "<image> in words"]
    table = pa.table({"prompt": prompts, "completion": ["x"] * 4, "image": pa.array(images, kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    pool = load_pool(tmp_path / "in.parquet")
    assert [(q.line, q.reason) for q in pool.quarantine] == [(2, "non-text-content")]
    write_subset(pool, [2, 0, 1], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table.take([3, 0, 2]))
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        write_subset(pool, [0, 1, 2], tmp_path / name)
        assert load_pool(tmp_path / name).ids.tolist() == pool.ids.tolist()


def test_rows_from_json_infer_their_types_and_mixed_columns_become_text(tmp_path: Path) -> None:
    texts = ['{"a": 1, "b": [1]}', '{"b": "x", "c": {"d": null}, "a": 2.5}', '{"e": true}']
    table = rows_table(texts)
    assert table.column_names == ["a", "b", "c", "e"]
    assert table["a"].to_pylist() == [1.0, 2.5, None] and table["b"].to_pylist() == ["[1]", '"x"', None]
    write_parquet(texts, tmp_path / "data" / "x.parquet")
    assert pq.read_table(tmp_path / "data" / "x.parquet").equals(table)


CHAT = ["messages", "sharegpt", "prompt-completion", "prompt-completion-chat", "alpaca", "question-answer"]


@pytest.mark.parametrize("to", ["messages", "alpaca", "sharegpt", "prompt-completion"])
@pytest.mark.parametrize("dialect", CHAT)
def test_other_dialects_keep_the_content(tmp_path: Path, dialect: str, to: str) -> None:
    rows = [good(dialect, k) for k in range(4)]
    if "history" in to or dialect == "messages":
        rows[1]["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    pool = load_pool(write_rows(tmp_path / "in.jsonl", rows))
    write_subset(pool, range(4), tmp_path / "out.jsonl", to=to)
    again = load_pool(tmp_path / "out.jsonl")
    assert again.dialect == to and again.ids.tolist() == pool.ids.tolist()


def test_a_mixed_pool_is_written_as_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_rows(tmp_path / f"{d}.jsonl", [good(d, k)]) for k, d in enumerate(["alpaca", "sharegpt", "text"])]
    pool = load_pool(paths)
    write_subset(pool, [1, 0], tmp_path / "chats.jsonl")
    again = load_pool(tmp_path / "chats.jsonl")
    assert again.dialect == "messages" and again.ids.tolist() == pool.ids[[1, 0]].tolist()
    write_subset(pool, [0], tmp_path / "one.jsonl")
    assert load_pool(tmp_path / "one.jsonl").dialect == "alpaca"
    assert row_texts(pool) == pool.table["raw"].to_pylist()
    assert "mixes plain text with chats" in caplog.text


def test_what_a_dialect_cannot_say_is_told(tmp_path: Path) -> None:
    chat = good("messages", 0)["messages"]
    tool = chat[:2] + [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"}, chat[2]]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [{"messages": chat}, {"messages": tool}]))
    with pytest.raises(DataError, match=r"x\.jsonl:2: can't be written as alpaca"):
        write_subset(pool, [0, 1], tmp_path / "out.jsonl", to="alpaca")
    assert not (tmp_path / "out.jsonl").exists()
    text = load_pool(write_rows(tmp_path / "t.jsonl", [good("text", 0)]))
    for to in ("messages", "alpaca", "sharegpt", "prompt-completion"):
        with pytest.raises(DataError, match="plain text, not a chat"):
            write_subset(text, [0], tmp_path / "out.jsonl", to=to)
    with pytest.raises(DataError, match="to 'yaml' is not known"):
        write_subset(text, [0], tmp_path / "out.jsonl", to="yaml")


@pytest.mark.parametrize(
    ("name", "to", "told"),
    [
        ("x.arrow", None, r"none of a jsonl file: name it \.jsonl$"),
        ("x.xlsx", "csv", r"none of a csv file: name it \.csv"),
        ("x.jsonl.bz2", None, "none of a jsonl file"),
        ("x.jsonl", "parquet", r"none of a parquet file: name it \.parquet$"),
        ("x.parquet.gz", None, "none of a parquet file"),
    ],
)
def test_a_name_that_promises_another_file(tmp_path: Path, name: str, to: str | None, told: str) -> None:
    pool = load_pool(write_rows(tmp_path / "in.jsonl", [good("alpaca", 1)]))
    with pytest.raises(DataError, match=told):
        write_subset(pool, [0], tmp_path / name, to)
    assert not (tmp_path / name).exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [good("alpaca", 0)]))
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="can't be written"):
        write_subset(pool, [0], tmp_path / "taken", to="jsonl")
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(DataError, match="can't be written"):
        write_subset(pool, [0], tmp_path / "x.jsonl" / "y.jsonl")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [good("alpaca", k) for k in range(50)]))
    for suffix in (".jsonl.gz", ".jsonl.zst", ".parquet", ".csv"):
        a, b = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
        write_subset(pool, range(50), a)
        write_subset(pool, range(50), b)
        assert a.read_bytes() == b.read_bytes()


def test_an_empty_subset(tmp_path: Path) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [good("alpaca", 0)]))
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        write_subset(pool, [], tmp_path / f"none{suffix}")
        assert (tmp_path / f"none{suffix}").exists()


def test_datasets_opens_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for dialect in ("messages", "alpaca", "preference-implicit"):
        rows = [good(dialect, k) for k in range(4)]
        folder = tmp_path / dialect
        write_parquet(row_texts(load_pool(write_rows(tmp_path / "x.jsonl", rows))), folder / "train-0.parquet")
        found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert [dict(row) for row in found] == rows
        found.save_to_disk(str(tmp_path / "saved" / dialect))
        pool = load_pool(tmp_path / "saved" / dialect)
        assert pool.ids.tolist() == load_pool(tmp_path / "x.jsonl").ids.tolist()


def test_a_dataset_dict_from_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [good("messages", k) for k in range(5)]
    whole: Any = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    whole.save_to_disk(str(tmp_path / "saved"))
    assert len(load_pool(tmp_path / "saved")) == 5


@pytest.mark.parametrize("dialect", SFT)
def test_reading_twice_changes_nothing(tmp_path: Path, dialect: str) -> None:
    first = load_pool(write_rows(tmp_path / "a.jsonl", [good(dialect, k) for k in range(5)]))
    write_subset(first, range(5), tmp_path / "b.jsonl")
    second = load_pool(tmp_path / "b.jsonl")
    assert second.table.drop_columns(["file", "source"]).equals(first.table.drop_columns(["file", "source"]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("to", [None, "messages"])
def test_a_column_of_weights_comes_back_beside_its_row(tmp_path: Path, suffix: str, to: str | None) -> None:
    source = tmp_path / "pool.jsonl"
    rows = [{"instruction": f"Case {i}", "output": "é" * (i + 1), "kept": 1e5} for i in range(5)]
    source.write_text("".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(rows)), "utf-8")
    pool, weights = load_pool(source), np.array([0.25, 1 / 3, 0.0])
    out = tmp_path / f"out{suffix}"
    write_subset(pool, [4, 1, 2], out, to=to, extra=("weight", weights))
    with pytest.raises(DataError, match="fractional-weight"):
        load_pool(out)
    again = load_pool(out, weight_column="weight")
    assert [str(i) for i in again.ids] == [str(pool.ids[i]) for i in (4, 1, 2)]
    assert again.weights("weight").tolist() == weights.tolist()


def test_the_rest_of_a_row_stays_byte_for_byte_beside_a_weight(tmp_path: Path) -> None:
    assert with_number('{"a": 1.50, "b": "\\u00e9}" }\n', "w", 0.5) == '{"a": 1.50, "b": "\\u00e9}", "w": 0.5}'
    assert with_number("{}", "w", 2.0) == '{"w": 2.0}'
    with pytest.raises(DataError, match="column 'w' already; name another with --weight_column"):
        with_number('{"w": null}', "w", 1.0)
    (tmp_path / "p.jsonl").write_text('{"prompt": "q", "completion": "a", "w": 3}\n')
    for name in ("o.jsonl", "o.parquet"):
        with pytest.raises(DataError, match="column 'w' already"):
            write_subset(load_pool(tmp_path / "p.jsonl"), [0], tmp_path / name, extra=("w", np.ones(1)))
        assert not (tmp_path / name).exists()
