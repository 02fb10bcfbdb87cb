"""Streamed dots and norms against the slow twin; the same numbers however the rows are batched."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import TinyRow, random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import ModelError  # noqa: E402
from keepset.features import influence as module  # noqa: E402
from keepset.features.adam import map_gradient  # noqa: E402
from keepset.features.influence import influence  # noqa: E402
from slow_gradients import flat, mean_nll_gradient, random_state, shapes_of, some_target  # noqa: E402  # noqa: E402
from tolerance import BACKWARD, FORWARD, MAPPED  # noqa: E402

MAPS = ["sgd", "adam", "adam-less", "precondition", "sign"]


def slow(peft, rows, target, state, kind):
    names = list(target.blocks)
    vectors = np.stack([flat({n: b[k] for n, b in target.blocks.items()}) for k in range(target.n_targets)])
    mapped = []
    for row in rows:
        g = mean_nll_gradient(peft, names, row)
        mapped.append(flat({n: map_gradient(kind, state, n, g[n]) for n in names}))
    zero = {n: map_gradient(kind, state, n, torch.zeros(target.blocks[n].shape[1:])) for n in names}
    rows_ = np.stack(mapped)
    norms = np.linalg.norm(rows_, axis=1)
    shared = flat(zero)
    length = np.linalg.norm(shared)
    return rows_ @ vectors.T, norms, rows_ @ shared / norms / length if length else np.zeros(len(rows))


@pytest.mark.parametrize("kind", MAPS)
def test_every_map(kind) -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(7, seed=12)
    target = some_target(peft)
    state = random_state(shapes_of(target))
    dots, norms, shared = slow(peft, rows, target, state, kind)
    found = influence(peft, rows, target, adam=state, map=kind, token_budget=60)
    tolerance = 1e-2 if kind == "sign" else MAPPED  # rounding can flip the sign of a coordinate near 0
    assert np.abs(found.dots - dots).max() <= tolerance * np.abs(dots).max()
    assert np.allclose(found.norms, norms, rtol=tolerance)
    assert np.allclose(found.momentum, shared, atol=2 * MAPPED)
    assert (found.momentum.min() > 0.05) == (kind in ("adam", "adam-less"))


def test_every_architecture_and_batch_budget(model) -> None:
    peft, rows = tiny_lora(model), random_rows(7, seed=13)
    target = some_target(peft)
    state = random_state(shapes_of(target))
    dots, norms, _ = slow(peft, rows, target, state, "adam")
    cosines = dots / norms[:, None]
    for budget in (1, 40, 75, 1000):
        found = influence(peft, rows, target, adam=state, map="adam", token_budget=budget)
        assert np.abs(found.dots / found.norms[:, None] - cosines).max() <= MAPPED * max(1.0, np.abs(cosines).max())
        assert np.allclose(found.norms, norms, rtol=MAPPED)


def test_padded_path_gives_the_same_numbers(architecture) -> None:
    packed, padded = (tiny_lora(tiny_model(architecture, attn=a)) for a in ("keepset", "eager"))
    rows, target = random_rows(6, seed=14), some_target(packed)
    a, b = (influence(m, rows, target, map="sgd", token_budget=64) for m in (packed, padded))
    assert np.abs(a.dots - b.dots).max() <= BACKWARD * np.abs(a.dots).max()
    assert np.allclose(a.norms, b.norms, rtol=BACKWARD) and np.allclose(a.loss, b.loss, rtol=4 * FORWARD)


def test_small_blocks_give_the_same_numbers(monkeypatch) -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(5, seed=15)
    target = some_target(peft)
    state = random_state(shapes_of(target))
    want = influence(peft, rows, target, adam=state)
    monkeypatch.setattr(module, "BLOCK", 50)  # less than one row of one matrix
    got = influence(peft, rows, target, adam=state)
    assert np.abs(got.dots - want.dots).max() <= MAPPED * np.abs(want.dots).max()
    assert np.allclose(got.norms, want.norms, rtol=MAPPED)


def test_permuting_rows_permutes_the_numbers() -> None:
    peft, rows = tiny_lora(tiny_model("qwen3")), random_rows(8, seed=16)
    target = some_target(peft)
    order = np.random.default_rng(0).permutation(8)
    a = influence(peft, rows, target, map="sgd", token_budget=50)
    b = influence(peft, [rows[i] for i in order], target, map="sgd", token_budget=50)
    assert np.abs(a.dots[order] - b.dots).max() <= BACKWARD * np.abs(b.dots).max()
    assert np.allclose(a.norms[order], b.norms, rtol=BACKWARD)


def test_loss_is_the_mean_token_loss() -> None:
    from slow_gradients import token_logps

    peft, rows = tiny_lora(tiny_model("gemma3")), random_rows(4, seed=17)
    found = influence(peft, rows, some_target(peft), map="sgd")
    assert np.allclose(found.loss, [-float(token_logps(peft, r).mean()) for r in rows], rtol=FORWARD)


def test_a_row_without_gradient_is_flagged() -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(3, seed=18)
    silent = TinyRow(rows[1].input_ids, np.zeros(len(rows[1].input_ids), bool))
    target = some_target(peft)
    found = influence(peft, [rows[0], silent, rows[2]], target, adam=random_state(shapes_of(target)), map="adam")
    assert found.zero.tolist() == [False, True, False]
    assert found.grad_norms[1] == 0 and found.norms[1] > 0 and found.momentum[1] == pytest.approx(1)
    assert np.isfinite(found.dots).all()


def test_last_layers_and_full_matrices() -> None:
    model, rows = tiny_model("mistral"), random_rows(5, seed=19)
    chosen = {"matrices": ["*.layers.1.mlp.*"]}
    target = some_target(model, reference="none", **chosen)
    dots, norms, _ = slow(model, rows, target, None, "sgd")
    found = influence(model, rows, target, map="sgd", **chosen)
    assert np.abs(found.dots - dots).max() <= BACKWARD * np.abs(dots).max()
    assert np.allclose(found.norms, norms, rtol=BACKWARD)
    peft = tiny_lora(model)
    top = some_target(peft, last_layers=1)
    dots, norms, _ = slow(peft, rows, top, None, "sgd")
    found = influence(peft, rows, top, map="sgd", last_layers=1)
    assert np.abs(found.dots - dots).max() <= BACKWARD * np.abs(dots).max()
    assert np.allclose(found.norms, norms, rtol=BACKWARD)
    with pytest.raises(ModelError, match="formed for other matrices"):
        influence(peft, rows, top, map="sgd")
