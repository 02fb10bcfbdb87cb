"""The gradient store: a projection that any slice can regenerate, resumable shards, refusals, its own error."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import KeepsetError, PlanMismatch, RecipeError  # noqa: E402
from keepset.features import gradient_store  # noqa: E402
from keepset.features.adam import AdamState  # noqa: E402
from keepset.features.gradient_store import GradientStore, build_store  # noqa: E402
from keepset.features.influence import influence  # noqa: E402
from keepset.features.projection import project_target, store_error, target_lengths  # noqa: E402
from keepset.features.targets import target_vectors  # noqa: E402
from slow_gradients import random_state  # noqa: E402
from tolerance import BACKWARD  # noqa: E402

MADE = {"model": "m1", "adapter": "a1", "tokenizer": "t1", "template": "c1"}


def setup():
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(24, seed=41)
    pairs = random_rows(8, seed=42)
    target = target_vectors(peft, [(pairs[2 * i], pairs[2 * i + 1]) for i in range(4)], np.array([0, 0, 1, 1]))
    state = random_state({n: tuple(b.shape[1:]) for n, b in target.blocks.items()})
    return peft, rows, [f"id{i}" for i in range(24)], target, state


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2e-3), ("int8", 3e-2)])
def test_store_estimates_dots_and_knows_its_error(tmp_path, dtype, rounding) -> None:
    peft, rows, ids, target, state = setup()
    exact = influence(peft, rows, target, adam=state, map="precondition")
    store = GradientStore.create(tmp_path, MADE, dim=4096, dtype=dtype, map="precondition")
    build_store(store, peft, rows, ids, adam=state, chunk=10)
    files = [load_file(tmp_path / f"0000{number}.safetensors") for number in range(3)]
    assert [file["rows"].shape for file in files] == [(10, 4096), (10, 4096), (4, 4096)]
    assert {str(file["rows"].dtype) for file in files} == {dtype}
    assert np.allclose(store.norms, exact.norms, rtol=BACKWARD)
    assert np.array_equal(np.concatenate([file["norm"] for file in files]), store.norms)
    projected = project_target(store.sketch, target, map="precondition", adam=state)
    assert not projected.shared.any() and not store.momentum.any()
    dots = store.dots(projected)
    by_hand = [file["rows"].astype(np.float64) * file["scale"][:, None] @ projected.sketches.T for file in files]
    assert np.allclose(dots, np.concatenate(by_hand), rtol=0, atol=1e-5 * np.abs(dots).max())
    again = GradientStore.create(tmp_path, MADE, dim=4096, dtype=dtype, map="precondition")
    assert np.array_equal(again.dots(projected), dots) and np.array_equal(again.norms, store.norms)
    sketches = influence(peft, rows, target, adam=state, map="precondition", sketch=store.sketch).sketch
    unrounded = sketches @ projected.sketches.T
    lengths = exact.norms[:, None] * target_lengths(target)
    assert np.abs((dots - unrounded) / lengths).max() < rounding
    error = store_error(dots, exact.dots, exact.norms, target_lengths(target))
    assert 0 < error.rms < 2.5 / np.sqrt(4096) + rounding and error.spearman.min() > 0.9


@pytest.mark.parametrize("kind", ["adam", "adam-less"])
def test_what_all_rows_share_costs_no_accuracy(tmp_path, kind) -> None:
    """The Adam maps' shared term is most of the vector here; the plain sketch of it would be the larger error."""
    peft, rows, ids, target, state = setup()
    state = AdamState({n: 20 * m for n, m in state.exp_avg.items()}, state.exp_avg_sq, state.step)
    exact = influence(peft, rows, target, adam=state, map=kind)
    assert np.median(exact.momentum) > 0.9
    store = build_store(GradientStore.create(tmp_path, MADE, dim=512, map=kind), peft, rows, ids, adam=state)
    assert np.allclose(store.momentum, exact.momentum, rtol=BACKWARD)
    projected = project_target(store.sketch, target, map=kind, adam=state)
    lengths = target_lengths(target)
    error = store_error(store.dots(projected), exact.dots, exact.norms, lengths)
    whole = influence(peft, rows, None, adam=state, map=kind, sketch=store.sketch).sketch
    plain = store_error(whole @ project_target(store.sketch, target).sketches.T, exact.dots, exact.norms, lengths)
    own = np.sqrt(1 - np.median(exact.momentum) ** 2)
    assert error.rms < 0.6 * plain.rms and error.rms < 2.5 * own / np.sqrt(512)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("left", ["part of a file", "a file without its record", "the first shard alone"])
def test_a_store_that_was_killed_goes_on_and_ends_with_the_same_files(tmp_path, left) -> None:
    """Also the case of a pool that grew at its end: the rows that are there aren't made again."""
    peft, rows, ids, _, state = setup()
    once = build_store(GradientStore.create(tmp_path / "once", MADE, dim=256), peft, rows, ids, adam=state, chunk=8)
    part = GradientStore.create(tmp_path / "part", MADE, dim=256)
    build_store(part, peft, rows[:8], ids[:8], adam=state, chunk=8)
    if left == "part of a file":
        (tmp_path / "part/00001.safetensors.part").write_bytes(b"half a row")
    elif left == "a file without its record":
        (tmp_path / "part/00001.safetensors").write_bytes(contents(tmp_path / "once")["00001.safetensors"])
    again = GradientStore.create(tmp_path / "part", MADE, dim=256)
    assert [places for _, places in again.missing(ids, 8)] == [range(8, 16), range(16, 24)]
    done = []
    build_store(again, peft, rows, ids, adam=state, chunk=8, progress=done.append)
    assert done == [8, 8] and again.n_rows == once.n_rows == 24
    assert contents(tmp_path / "part") == contents(tmp_path / "once")


def damage(path, how, at) -> None:
    whole = path.read_bytes()
    kept = {"one byte short": len(whole) - 1, "cut to half": len(whole) // 2, "empty": 0}
    if how == "missing":
        path.unlink()
    elif how == "one bit":
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    else:
        path.write_bytes(whole[: kept[how]])


@pytest.fixture
def made(monkeypatch):
    """The rows whose gradients are taken."""
    taken, real = [], gradient_store.influence
    monkeypatch.setattr(
        gradient_store, "influence", lambda m, part, *a, **k: (taken.extend(part), real(m, part, *a, **k))[1]
    )
    return taken


def record_place(field: str) -> int:
    """A byte within the value of a field of a record of 6 rows."""
    record = json.dumps({"ids": "0" * 64, "rows": 6, "sha256": "0" * 64}, separators=(",", ":"))
    return record.index(f'"{field}":') + len(field) + (3 if field == "rows" else 9)


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize(
    ("kind", "how", "at"),
    [
        *[("safetensors", how, 0) for how in ("one byte short", "cut to half", "empty", "missing")],
        *[("safetensors", "one bit", at) for at in (0, 9, 99, -1, -700)],
        *[("json", how, 0) for how in ("one bit", "one byte short", "cut to half", "empty", "missing")],
        *[("json", "one bit", record_place(field)) for field in ("ids", "rows", "sha256")],
    ],
)
def test_a_damaged_shard_is_refused_and_alone_made_again(tmp_path, made, kind, how, at, number) -> None:
    peft, rows, ids, target, state = setup()
    store = build_store(GradientStore.create(tmp_path, MADE, dim=64), peft, rows, ids, adam=state, chunk=6)
    expected, vectors = contents(tmp_path), project_target(store.sketch, target)
    want, norms = store.dots(vectors), store.norms
    damage(tmp_path / f"{number:05d}.{kind}", how, at)
    again = GradientStore.create(tmp_path, MADE, dim=64)
    harmless = kind == "json" and at == record_place("rows")  # the arrays, whole by their checksum, have the count too
    if not harmless:
        for refused in (lambda: store.dots(vectors), lambda: again.dots(vectors), lambda: again.norms):
            with pytest.raises(KeepsetError, match=f"shard {number} is damaged"):
                refused()
    del made[:]
    build_store(again, peft, rows, ids, adam=state, chunk=24)
    assert [id(row) for row in made] == [id(row) for row in ([] if harmless else rows[6 * number : 6 * number + 6])]
    assert harmless or contents(tmp_path) == expected
    assert np.array_equal(again.dots(vectors), want) and np.array_equal(again.norms, norms)


def test_from_a_shard_whose_row_count_is_lost_on_all_is_made_again(tmp_path, made) -> None:
    peft, rows, ids, target, state = setup()
    store = build_store(GradientStore.create(tmp_path, MADE, dim=64), peft, rows, ids, adam=state, chunk=6)
    want = store.dots(project_target(store.sketch, target))
    for kind in ("json", "safetensors"):
        damage(tmp_path / f"00001.{kind}", "empty", 0)
    again = GradientStore.create(tmp_path, MADE, dim=64)
    assert again.n_rows == 6
    del made[:]

    def kill(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # shards of the old sizes behind the new one would count as other rows
        build_store(again, peft, rows, ids, adam=state, chunk=5, progress=kill)
    assert sorted(contents(tmp_path)) == sorted(["header.json", *(f"0000{n}.{k}" for n in (0, 1) for k in (
        "json", "safetensors"))])  # fmt: skip
    again = build_store(GradientStore.create(tmp_path, MADE, dim=64), peft, rows, ids, adam=state, chunk=5)
    assert [id(row) for row in made] == [id(row) for row in rows[6:]]
    assert np.abs(again.dots(project_target(store.sketch, target)) - want).max() < 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "\x00"])
def test_a_damaged_header_is_one_line(tmp_path, text) -> None:
    GradientStore.create(tmp_path, MADE, dim=64)
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(KeepsetError, match="header.json: damaged") as caught:
        GradientStore.create(tmp_path, MADE, dim=64)
    assert "\n" not in str(caught.value)


def test_store_refuses_what_it_was_not_made_for(tmp_path) -> None:
    peft, rows, ids, _, state = setup()
    build_store(GradientStore.create(tmp_path, MADE, dim=64), peft, rows[:4], ids[:4], adam=state)
    for change in ({"model": "m2"}, {"adapter": "a2"}, {"tokenizer": "t2"}, {"template": "c2"}, {"data": "d"}):
        with pytest.raises(PlanMismatch, match=f"made with {next(iter(change))} ="):
            GradientStore.create(tmp_path, {**MADE, **change}, dim=64)
    for options in ({"dim": 128}, {"dim": 64, "seed": 1}, {"dim": 64, "map": "sgd"}, {"dim": 64, "dtype": "int8"}):
        with pytest.raises(PlanMismatch):
            GradientStore.create(tmp_path, MADE, **options)
    store = GradientStore.create(tmp_path, MADE, dim=64)
    with pytest.raises(PlanMismatch, match="are not the first"):
        build_store(store, peft, rows, ["other", *ids[1:]], adam=state)
    with pytest.raises(PlanMismatch, match="its 4 rows are not the first of these 3"):
        build_store(store, peft, rows[:3], ids[:3], adam=state)
    with pytest.raises(ValueError, match="not finite"):
        store.write(["x"], np.full((1, 64), np.nan, np.float32), np.ones(1), np.ones(1))
    with pytest.raises(RecipeError, match="float16 or int8"):
        GradientStore.create(tmp_path / "new", MADE, dtype="float64")
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps({**header, "version": 3}))
    with pytest.raises(PlanMismatch, match="made with version = 3, not 4; use another folder"):
        GradientStore.create(tmp_path, MADE, dim=64)
