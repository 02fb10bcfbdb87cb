"""A pool that lies in a mapped file against the same pool in memory."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest

from keepset.data import load_pool, spool, write_subset
from keepset.data.columns import CHUNK_ROWS
from keepset.recipe import DataSpec


@pytest.fixture
def path(tmp_path, monkeypatch):
    draw = random.Random(0)
    rows = [{"prompt": f"q{draw.randrange(40)}", "chosen": f"yes {i % 50}", "rejected": "no", "kind": "ab"[i % 2]}
            for i in range(70)]  # fmt: skip
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    monkeypatch.setattr("keepset.data.pool.CHUNK_ROWS", 16)
    return file


@pytest.mark.parametrize("pairs", [False, True])
def test_a_pool_on_disk_is_the_pool_in_memory(path, pairs, tmp_path, monkeypatch):
    spec = DataSpec.model_validate({"path": str(path), "pairs": pairs, "category_column": "kind"})
    here = load_pool(spec)
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    there = load_pool(spec, folder=tmp_path / "work")
    assert not here.mapped and len(there.mapped) == 2 and not list((tmp_path / "work").iterdir())
    assert there.table.equals(here.table) and there.table.schema == here.table.schema
    assert (
        there.ids.tolist() == here.ids.tolist() == here.table["id"].to_pylist() and there.duplicates == here.duplicates
    )
    assert there.quarantine == here.quarantine and there.fingerprint() == here.fingerprint()
    assert list(there.all_messages()) == [here.messages(i) for i in range(70)] == [there.messages(i) for i in range(70)]
    assert there.sources().tolist() == here.sources().tolist() and set(there.categories()) == {"a", "b"}
    if pairs:
        assert list(there.all_pairs()) == list(here.all_pairs())
    picks = np.array([69, 3, 3, 40, 0, 17])
    for indices in (picks, np.sort(picks), [], picks[:1]):
        wanted = here.table.take(pa.array(np.asarray(indices, dtype=np.int64)))
        for pool in (here, there):
            part = pool.take(indices)
            assert part.table.equals(wanted) and part.ids.tolist() == wanted["id"].to_pylist() and not part.mapped
            assert [len(p) for p in pool.taken(indices, rows=4)] == [4, 2][: -(-len(indices) // 4)] or len(indices) < 4
        for k, pool in enumerate((here, there)):
            write_subset(pool, indices, tmp_path / f"{k}.jsonl")
        assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    with pytest.raises(IndexError):
        there.take([70])


def test_a_folder_that_can_not_be_written_is_no_hindrance(path, tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    (tmp_path / "file").write_text("")
    assert len(load_pool(path, folder=tmp_path / "file" / "work").mapped) == 2 and CHUNK_ROWS == 32768
