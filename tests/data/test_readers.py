"""Folders, names, saved datasets and the hub: which files are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_rows import good, lines, parquet, write_lines, write_rows
from keepset.data import FileRefused, load_pool, write_subset
from keepset.recipe import DataSpec


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
