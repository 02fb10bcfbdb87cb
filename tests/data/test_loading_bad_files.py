"""Bad files: refused as a whole with one line, or read as far as they are sound with the damage told."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_rows import good, lines, write_lines, write_rows
from keepset.data import FileRefused, load_pool, load_target, write_subset
from keepset.errors import DataError
from keepset.recipe import DataSpec


def jsonl(n: int = 5) -> bytes:
    return b"\n".join(lines("alpaca", n)) + b"\n"


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


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


# --------------------------------------------------------------------------------------- folders, names, sections


def test_mixed_schemas_over_shards(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [good("alpaca", k) for k in range(3)])
    write_rows(tmp_path / "b.jsonl", [good("messages", k) for k in range(3, 6)])
    parquet(tmp_path / "c.parquet", [good("sharegpt", k) for k in range(6, 9)])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    pool = load_pool(tmp_path)
    assert len(pool) == 9 and pool.dialect == "mixed"
    assert [info.dialect for info in pool.files] == ["alpaca", "messages", "sharegpt"]
    assert set(pool.sources()) == {tmp_path.name}


def test_folder_with_splits_gives_the_split_asked_for(tmp_path: Path) -> None:
    for name in ("train-00000", "train-00001", "test", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [good("alpaca", hash(name) % 10_000)])
    assert len(load_pool(tmp_path)) == 2
    assert len(load_pool(DataSpec.model_validate({"path": str(tmp_path), "split": "test"}))) == 1
    assert len(load_pool(DataSpec.model_validate({"path": str(tmp_path), "split": "valid"}))) == 1
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(FileRefused, match="no split 'dev'; there are: test, train"):
        load_pool(DataSpec.model_validate({"path": str(tmp_path), "split": "dev"}))


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k, name in enumerate(("train-00000", "more")):
        write_rows(tmp_path / f"{name}.jsonl", [good("alpaca", k)])
    (tmp_path / "old.jsonl.bz2").write_bytes(b"BZh9")
    (tmp_path / "dataset_infos.json").write_text("{}")  # about the data, not data
    assert len(load_pool(tmp_path)) == 1
    assert f"{tmp_path}: not read, since other names tell splits and these none: more.jsonl" in caplog.messages
    assert f"{tmp_path}: not read, as files of another kind: old.jsonl.bz2" in caplog.messages
    (tmp_path / "train-00000.jsonl").unlink()
    caplog.clear()
    assert len(load_pool(tmp_path)) == 1 and len(caplog.messages) == 1


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileRefused, match="holds no data files"):
        load_pool(tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "alpaca.jsonl", lines("alpaca"))
    with pytest.raises(FileRefused, match=r"did you mean '.*alpaca\.jsonl'") as stop:
        load_pool(tmp_path / "alpacca.jsonl")
    assert stop.value.reason == "no-such-file"


def test_folder_that_must_not_be_entered(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))
    with pytest.raises(FileRefused, match="names no data files of its own folder"):
        load_pool(tmp_path)


def test_saved_dataset_dict(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    table = pa.Table.from_pylist([good("alpaca", k) for k in range(4)])
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "d.arrow"}], "_split": "train"}))
    with pa.OSFile(str(folder / "d.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    assert len(load_pool(tmp_path)) == 4
    with pytest.raises(FileRefused, match="no split 'dev'; there are: train, test"):
        load_pool(DataSpec.model_validate({"path": str(tmp_path), "split": "dev"}))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "d.arrow"}], "_indices_data_files": [{"filename": "i"}]})
    )
    with pytest.raises(FileRefused, match="flatten_indices"):
        load_pool(tmp_path)


class _FakeHub:
    """Stands for the `datasets` module."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.asked = rows, None

    def load_dataset(self, name: str, config: str | None, *, split: str) -> Any:
        self.asked = (name, config, split)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_hub_name_goes_through_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        dict.fromkeys(("instruction", "input", "output"), datasets.Value("string"))
        | {"picture": datasets.Image(), "score": datasets.Value("float16")}
    )
    image = {"bytes": b"no image at all", "path": "a.png"}
    rows = [{"instruction": f"q{k}", "input": "", "output": f"a{k}", "picture": image, "score": 0.5} for k in range(3)]
    hub = _FakeHub(datasets.Dataset.from_list(rows, features=features))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    pool = load_pool("owner/some-name:main")
    assert len(pool) == 3 and hub.asked == ("owner/some-name", "main", "train")
    assert pool.files[0].container == "hub" and set(pool.sources()) == {"some-name"}
    write_subset(pool, [2, 0], tmp_path / "out.parquet")  # nothing was decoded, so the image's bytes are its own
    again = pq.read_table(tmp_path / "out.parquet")
    assert again.to_pylist() == [rows[2], rows[0]] and again.schema.equals(features.arrow_schema)


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", _FakeHub(ConnectionError("no\nnetwork")))
    with pytest.raises(FileRefused, match="the hub gave: ConnectionError: no network"):
        load_pool("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileRefused, match=r"pip install 'keepset\[train\]'"):
        load_pool("owner/name")


def test_no_network_without_a_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = _FakeHub([])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for path in ("alpaca", "data/alpaca.jsonl", "./a/b", "/a/b", "../a/b", "a/b/c", "a/b.parquet"):
        with pytest.raises(FileRefused, match="no such file"):
            load_pool(path)
    assert hub.asked is None


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
