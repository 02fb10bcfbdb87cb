"""The gradient store: a projection that any slice can regenerate, resumable files, refusals, its own error."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import KeepsetError, PlanMismatch, RecipeError  # noqa: E402
from keepset.features.adam import AdamState  # noqa: E402
from keepset.features.gradient_store import GradientStore, build_store  # noqa: E402
from keepset.features.influence import influence  # noqa: E402
from keepset.features.projection import dimension_for, project_target, store_error, target_lengths  # noqa: E402
from keepset.features.sketch import Sketch  # noqa: E402
from keepset.features.targets import target_vectors  # noqa: E402
from slow_gradients import random_state  # noqa: E402
from tolerance import BACKWARD, FORWARD  # noqa: E402

BUCKETS, SIGNS = [16, 25, 5, 57, 20, 22], [1, -1, -1, -1, -1, 1]
MADE = {"model": "m1", "adapter": "a1", "tokenizer": "t1", "template": "c1"}


def test_any_slice_is_the_same_and_values_are_fixed() -> None:
    sketch = Sketch(100, seed=3)
    bucket, sign = sketch.slots("layer.A", 0, 1000)
    for start, stop in ((0, 1), (17, 500), (999, 1000)):
        b, s = sketch.slots("layer.A", start, stop)
        assert b.equal(bucket[start:stop]) and s.equal(sign[start:stop])
    # written down once: a change of hash would make every existing store wrong
    assert bucket[:6].tolist() == BUCKETS and sign[:6].tolist() == SIGNS
    assert not Sketch(100, seed=4).slots("layer.A", 0, 1000)[0].equal(bucket)
    assert not sketch.slots("layer.B", 0, 1000)[0].equal(bucket)


def test_hash_against_python_integers() -> None:
    """SplitMix64's finaliser in unbounded integers."""
    import hashlib

    sketch, mask = Sketch(777, seed=9), (1 << 64) - 1
    key = int.from_bytes(hashlib.sha256(b"9:w").digest()[:8], "little")
    bucket, sign = sketch.slots("w", 5, 25)
    for k, i in enumerate(range(5, 25)):
        x = (i * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        assert int(bucket[k]) == ((x >> 32) & 0x7FFFFFFF) % 777 and int(sign[k]) == (x & 1) * 2 - 1


def test_buckets_and_signs_are_even_and_dots_unbiased() -> None:
    bucket, sign = Sketch(64).slots("w", 0, 200_000)
    counts = np.bincount(bucket.numpy(), minlength=64)
    assert abs(counts / 3125 - 1).max() < 0.1 and abs(sign.float().mean()) < 0.01
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((1, 3000)).astype(np.float32)) for _ in range(2))
    b = b + a
    found = []
    for seed in range(200):
        sketch = Sketch(256, seed)
        x, y = (sketch.add_(torch.zeros(1, 256), "w", v, 0) for v in (a, b))
        found.append(float((x * y).sum()))
    exact, spread = float((a * b).sum()), float(a.norm() * b.norm()) * np.sqrt(2 / 256)
    assert abs(np.mean(found) - exact) < 4 * spread / np.sqrt(200)
    assert np.std(found) < 1.2 * spread


def test_pieces_add_up() -> None:
    sketch, v = Sketch(32), torch.randn(2, 90)
    whole = sketch.add_(torch.zeros(2, 32), "w", v, 0)
    parts = torch.zeros(2, 32)
    for start in range(0, 90, 40):
        sketch.add_(parts, "w", v[:, start : start + 40], start)
    assert torch.allclose(whole, parts, atol=4 * FORWARD)


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
    assert store.row_bytes == 4096 * (2 if dtype == "float16" else 1)
    assert (tmp_path / "rows.bin").stat().st_size == 24 * store.row_bytes and store.ids == ids
    assert np.allclose(store.norms, exact.norms, rtol=BACKWARD)
    projected = project_target(store.sketch, target, map="precondition", adam=state)
    assert not projected.shared.any() and not store.momentum.any()
    dots = store.dots(projected, block=7)
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


def test_store_resumes_appends_and_cuts_off_what_a_kill_left(tmp_path) -> None:
    peft, rows, ids, _, state = setup()
    once = GradientStore.create(tmp_path / "once", MADE, dim=256)
    build_store(once, peft, rows, ids, adam=state, chunk=8)
    part = GradientStore.create(tmp_path / "part", MADE, dim=256)
    build_store(part, peft, rows[:8], ids[:8], adam=state, chunk=8)
    with open(tmp_path / "part/rows.bin", "ab") as file:
        file.write(b"half a row")  # written, but state.json does not know
    with open(tmp_path / "part/ids.txt", "ab") as file:
        file.write(b"id8\nid")
    again = GradientStore.create(tmp_path / "part", MADE, dim=256)
    assert again.n_rows == 8
    done = []
    build_store(again, peft, rows, ids, adam=state, chunk=8, progress=done.append)
    assert done == [16, 24]
    for name in ("rows.bin", "rows.meta", "ids.txt", "state.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.parametrize("name", ["rows.bin", "rows.meta", "ids.txt"])
@pytest.mark.parametrize("damage", ["one bit", "one byte short", "cut to half", "empty"])
def test_damaged_rows_are_refused_and_only_they_made_again(tmp_path, monkeypatch, name, damage) -> None:
    peft, rows, ids, target, state = setup()
    store = build_store(GradientStore.create(tmp_path, MADE, dim=64), peft, rows, ids, adam=state)
    files = {n: (tmp_path / n).read_bytes() for n in ("rows.bin", "rows.meta", "ids.txt", "state.json")}
    whole = files[name]
    cuts = {"one byte short": -1, "cut to half": len(whole) // 2, "empty": 0}
    flipped = whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]
    (tmp_path / name).write_bytes(flipped if damage == "one bit" else whole[: cuts[damage]])
    again, vectors = GradientStore.create(tmp_path, MADE, dim=64), project_target(store.sketch, target)
    if (name, damage) != ("ids.txt", "one byte short"):  # the last line break alone: nothing is lost
        with pytest.raises(KeepsetError, match=r"row \d+ is damaged"):
            again.dots(vectors, block=5)
    made = []
    import keepset.features.gradient_store as module

    real = module.influence
    monkeypatch.setattr(module, "influence", lambda m, some, *a, **k: (made.extend(some), real(m, some, *a, **k))[1])
    build_store(again, peft, rows, ids, adam=state)
    expected = {"one bit": 1, "one byte short": 1, "cut to half": 12, "empty": 24}[damage]
    assert len(made) == (0 if name == "ids.txt" else expected)
    assert (tmp_path / "ids.txt").read_bytes() == files["ids.txt"]
    found, want = again.dots(vectors), store.dots(vectors)
    assert np.abs(found - want).max() < 1e-3 * np.abs(want).max()
    build_store(again, peft, rows, ids, adam=state)
    assert len(made) == (0 if name == "ids.txt" else expected)


@pytest.mark.parametrize("name", ["header.json", "state.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "\x00"])
def test_a_damaged_header_is_one_line(tmp_path, name, text) -> None:
    GradientStore.create(tmp_path, MADE, dim=64)
    (tmp_path / name).write_text(text)
    with pytest.raises(KeepsetError, match=f"{name}: damaged") as caught:
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
    with pytest.raises(ValueError, match="not finite"):
        store.append(["x"], np.full((1, 64), np.nan, np.float32), np.ones(1), np.ones(1))
    with pytest.raises(RecipeError, match="float16 or int8"):
        GradientStore.create(tmp_path / "new", MADE, dtype="float64")


def test_dimension_for_a_stated_error() -> None:
    assert dimension_for(0.01) == 10048 and dimension_for(0.5) == 64
    with pytest.raises(RecipeError, match="between 0 and 1"):
        dimension_for(0)
