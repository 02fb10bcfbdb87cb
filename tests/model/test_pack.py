"""Packed and padded batches give the losses of one row at a time, on every architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from conftest import TinyRow, random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.model import pack as packing  # noqa: E402
from keepset.model.attention import Segments, packed_attention  # noqa: E402
from keepset.model.head import LogitMap, nll  # noqa: E402
from slow_gradients import one_by_one  # noqa: E402
from tolerance import BACKWARD, FORWARD  # noqa: E402


def in_batches(model: Any, rows: list[TinyRow], budget: int, *, packed: bool) -> np.ndarray:
    out = np.zeros(len(rows))
    with torch.no_grad():
        for index in packing.plan_batches([len(r.input_ids) for r in rows], budget):
            batch = packing.pack(rows, index, packed=packed, pad_token_id=2)
            out[index] = packing.row_sums(packing.token_nll(model, batch), batch.row_of, len(index)).numpy()
    return out


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
@settings(max_examples=100, deadline=None)
def test_plan_uses_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = packing.plan_batches(lengths, budget)
    assert sorted(int(i) for b in plan for i in b) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    assert [int(i) for b in plan for i in b] == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@pytest.mark.parametrize("packed", [True, False])
def test_losses_equal_one_row_at_a_time(architecture: str, packed: bool) -> None:
    rows = [*random_rows(9, seed=1), random_rows(1, seed=2, shortest=12, longest=12)[0]]
    rows = rows + [rows[0], rows[4]]  # equal lengths share an attention call
    want = one_by_one(tiny_model(architecture, attn="eager"), rows)
    model = tiny_model(architecture)
    assert packing.supports_packing(model)
    for budget in (1, 40, 1000):
        np.testing.assert_allclose(in_batches(model, rows, budget, packed=packed), want, rtol=FORWARD)


def test_order_does_not_matter_and_a_rerun_is_identical(architecture: str) -> None:
    rows, model = random_rows(8, seed=3), tiny_model(architecture)
    first = in_batches(model, rows, 50, packed=True)
    assert first.tobytes() == in_batches(model, rows, 50, packed=True).tobytes()
    turned = in_batches(model, rows[::-1], 50, packed=True)[::-1]
    np.testing.assert_allclose(turned, first, rtol=FORWARD)


def test_adapter_on_and_off(architecture: str) -> None:
    rows, model = random_rows(6, seed=4), tiny_model(architecture)
    base = in_batches(model, rows, 60, packed=True)
    peft = tiny_lora(model)
    on = in_batches(peft, rows, 60, packed=True)
    np.testing.assert_allclose(on, one_by_one(peft, rows), rtol=FORWARD)
    assert np.abs(on / base - 1).max() > 1e-3
    with peft.disable_adapter():
        np.testing.assert_allclose(in_batches(peft, rows, 60, packed=True), base, rtol=FORWARD)


def test_shared_prefix_gives_the_same_losses(architecture: str) -> None:
    rows = random_rows(7, seed=5, prefix=11)
    rows[2].supervised[11] = True  # predicted from the prefix's last position
    wide = {"sliding_window": 64} if architecture in ("gemma3", "mistral") else {}
    model = tiny_model(architecture, **wide)
    index = np.arange(7)
    with torch.no_grad():
        batch = packing.pack(rows, index, packed=True, prefix=11)
        got = packing.row_sums(packing.token_nll(model, batch), batch.row_of, 7).numpy()
    assert batch.input_ids.shape[1] == 11 + sum(len(r.input_ids) - 11 for r in rows)
    np.testing.assert_allclose(got, one_by_one(model, rows), rtol=FORWARD)


def test_gradients_equal_plain_autograd(architecture: str) -> None:
    rows = random_rows(5, seed=6)
    plain, ours = tiny_model(architecture, attn="eager"), tiny_model(architecture)
    total = 0.0
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(row.supervised), ids, -100)
        total = total + plain(input_ids=ids, labels=labels).loss * int(row.supervised[1:].sum())
    total.backward()
    for packed in (True, False):
        ours.zero_grad()
        batch = packing.pack(rows, range(5), packed=packed)
        packing.token_nll(ours, batch, chunk=1000).sum().backward()
        for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            scale = q.grad.abs().max().item()
            assert (p.grad - q.grad).abs().max().item() <= BACKWARD * max(scale, 1e-3), name


@pytest.mark.parametrize("mapping", [LogitMap(), LogitMap(0.5), LogitMap(1.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_head_value_and_gradient(mapping: LogitMap, bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 700, bias=bias)
    hidden = torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(0, 700, (13,))
    weight = torch.randn(13)
    want = torch.nn.functional.cross_entropy(mapping(head(hidden)), labels, reduction="none")
    grads = torch.autograd.grad((want * weight).sum(), [hidden, *head.parameters()])
    got = nll(hidden, labels, head, mapping, chunk=13 * 300)
    torch.testing.assert_close(got, want, rtol=FORWARD, atol=FORWARD)
    mine = torch.autograd.grad((got * weight).sum(), [hidden, *head.parameters()])
    for a, b in zip(mine, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=BACKWARD, atol=FORWARD)


def test_a_large_vocabulary_loses_no_digits() -> None:
    """torch's own float32 loss is biased here; ours must stay with float64."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 262_144, bias=False)
    torch.nn.init.normal_(head.weight)
    hidden, labels = torch.randn(24, 16), torch.randint(0, 262_144, (24,))
    with torch.no_grad():
        exact = torch.nn.functional.cross_entropy(hidden.double() @ head.weight.double().T, labels, reduction="none")
        got = nll(hidden, labels, head, chunk=24 * 50_000)
    assert (got - exact).abs().max() < 8e-6
    assert abs((got - exact).sum().item() / exact.sum().item()) < 2e-7


def test_a_wrapped_head_is_called_as_a_module() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama", tie_word_embeddings=False)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"])).eval()
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    rows = random_rows(4, seed=7)
    np.testing.assert_allclose(in_batches(peft, rows, 50, packed=True), one_by_one(peft, rows), rtol=FORWARD)


def test_no_row_sees_another() -> None:
    """The gradient of one row's loss touches no other row's embeddings."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 4, requires_grad=True) for h in (4, 2, 2))
    out = packed_attention(q, k, v, Segments.of([4, 3, 2]))
    out[:, 4:7].sum().backward()
    for x in (q, k, v):
        assert x.grad[:, :, 4:7].abs().sum() > 0
        assert x.grad[:, :, :4].abs().sum() == 0 and x.grad[:, :, 7:].abs().sum() == 0


def test_any_architecture_is_packed_where_the_numbers_agree() -> None:
    from transformers import AutoModelForCausalLM, OlmoConfig

    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="keepset").eval()
    assert packing.supports_packing(model)
    assert not packing.supports_packing(tiny_model("llama", attn="sdpa"))
