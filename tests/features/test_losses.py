"""Row losses and representations: the obvious twins, one row at a time."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import TinyRow, random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.features.losses import row_losses  # noqa: E402
from keepset.features.representations import representations  # noqa: E402
from keepset.model import head  # noqa: E402
from keepset.model import pack as packing  # noqa: E402
from keepset.model.passes import Shortcuts, merged_weights, written_passes  # noqa: E402
from keepset.model.prefix import common_length, plan, prefix_groups  # noqa: E402
from slow_gradients import one_by_one  # noqa: E402
from tolerance import BACKWARD, FORWARD  # noqa: E402


def mixed_rows() -> list[TinyRow]:
    """Rows of two templates (shared beginnings) and some of none."""
    return [*random_rows(20, seed=1, prefix=12), *random_rows(20, seed=2, prefix=9), *random_rows(6, seed=3)]


def test_base_and_adapter_in_one_sweep(architecture: str) -> None:
    rows = mixed_rows()
    base = one_by_one(tiny_model(architecture, attn="eager"), rows)
    peft = tiny_lora(tiny_model(architecture))
    adapted = one_by_one(peft, rows)
    for budget in (30, 200):
        for share in (True, False):
            got = row_losses(peft, rows, token_budget=budget, adapters=(False, True), shortcuts=Shortcuts(prefix=share))
            np.testing.assert_allclose(got.nll[0], base, rtol=FORWARD)
            np.testing.assert_allclose(got.nll[1], adapted, rtol=2 * FORWARD)  # merged weights round once more
    assert got.n_tokens.tolist() == [int(r.supervised.sum()) for r in rows]
    assert got.nll.dtype == np.float64


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_pass_has_the_same_bits_whatever_runs_beside_it(architecture: str) -> None:
    """A shard whose base was lost is computed alone, and must come out as it was."""
    model, rows = tiny_lora(tiny_model(architecture)), random_rows(9, prefix=10)
    both = row_losses(model, rows, token_budget=256, adapters=(False, True)).nll
    for k, adapters in enumerate([(False,), (True,)]):
        assert (row_losses(model, rows, token_budget=256, adapters=adapters).nll[0] == both[k]).all()
    assert (row_losses(model.unload(), rows, token_budget=256, adapters=(False,)).nll[0] == both[0]).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=["lora", "whole"]
)
def test_an_adapter_on_the_head_is_off_in_the_pass_of_the_base(changes: dict, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    rows = random_rows(6, prefix=10)
    peft = get_peft_model(
        tiny_model("llama", tie_word_embeddings=tied), LoraConfig(**{"target_modules": ["q_proj"], **changes})
    ).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    for token_loss in ("ce", "error-norm"):
        both = row_losses(peft, rows, token_budget=200, adapters=(False, True), token_loss=token_loss).nll
        with peft.disable_adapter():
            base = row_losses(
                peft, rows, token_budget=200, shortcuts=Shortcuts(merge=False), token_loss=token_loss
            ).nll[0]
            if token_loss == "ce":
                np.testing.assert_allclose(base, one_by_one(peft, rows), rtol=FORWARD)
        np.testing.assert_allclose(both[0], base, rtol=FORWARD)
        assert not np.allclose(both[0], both[1], rtol=1e-3)
        if token_loss == "ce":
            np.testing.assert_allclose(both[1], one_by_one(peft, rows), rtol=2 * FORWARD)


def test_merged_weights_leave_the_model_as_it_was() -> None:
    peft = tiny_lora(tiny_model("llama"))
    before = {n: p.detach().clone() for n, p in peft.named_parameters()}
    rows = random_rows(5)
    merged = row_losses(peft, rows, token_budget=100, adapters=(True,)).nll
    plain = row_losses(peft, rows, token_budget=100, adapters=(True,), shortcuts=Shortcuts(merge=False)).nll
    np.testing.assert_allclose(merged, plain, rtol=FORWARD)
    merged_layers = merged_weights(peft) or []
    assert len(merged_layers) == 8
    for layer, weight, both in merged_layers:  # to rounding, as PEFT merges
        torch.testing.assert_close(both, weight + layer.get_delta_weight("default"))
    assert all(torch.equal(p, before[n]) for n, p in peft.named_parameters())
    np.testing.assert_allclose(one_by_one(peft, rows), plain[0], rtol=FORWARD)


def test_an_adapter_that_can_not_be_merged_runs_as_it_is() -> None:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    assert merged_weights(peft) is None
    rows = random_rows(4)
    got = row_losses(peft, rows, token_budget=100, adapters=(True,)).nll[0]
    np.testing.assert_allclose(got, one_by_one(peft, rows), rtol=FORWARD)


def test_identical_bytes_twice_and_any_order(architecture: str) -> None:
    rows, peft = mixed_rows(), tiny_lora(tiny_model(architecture))
    first = row_losses(peft, rows, token_budget=64, adapters=(False, True))
    again = row_losses(peft, rows, token_budget=64, adapters=(False, True))
    assert first.nll.tobytes() == again.nll.tobytes()
    order = np.random.default_rng(0).permutation(len(rows))
    turned = row_losses(peft, [rows[i] for i in order], token_budget=64, adapters=(False, True))
    np.testing.assert_allclose(turned.nll, first.nll[:, order], rtol=FORWARD)


def test_the_padded_path_gives_the_same(architecture: str) -> None:
    rows = random_rows(8, seed=5)
    packed = row_losses(tiny_model(architecture), rows, token_budget=64).nll
    plain = tiny_model(architecture, attn="sdpa")
    assert not packing.supports_packing(plain)
    np.testing.assert_allclose(row_losses(plain, rows, token_budget=64).nll, packed, rtol=FORWARD)


def test_token_losses_add_up_and_the_other_kinds_are_torch_s() -> None:
    rows, model = random_rows(6, seed=6), tiny_model("gemma3")
    got = row_losses(model, rows, token_budget=60, per_token=True)
    smooth = row_losses(model, rows, token_budget=60, token_loss="label-smoothed").nll[0]
    focal = row_losses(model, rows, token_budget=60, token_loss="focal").nll[0]
    error = row_losses(model, rows, token_budget=60, token_loss="error-norm").nll[0]
    both = row_losses(model, rows, token_budget=60, token_loss="entropy")
    assert both.entropy is not None and (both.nll == got.nll).all()  # the loss beside the entropy is the plain one
    assert got.token_nll is not None
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        with torch.no_grad():
            z = model(input_ids=ids[None]).logits[0, :-1]
        keep = torch.tensor(row.supervised[1:])
        ce = torch.nn.functional.cross_entropy(z, ids[1:], reduction="none")[keep]
        np.testing.assert_allclose(got.token_nll[0][i], ce.numpy(), rtol=FORWARD, atol=FORWARD)
        assert abs(got.token_nll[0][i].astype(np.float64).sum() - got.nll[0, i]) < 1e-6
        want = torch.nn.functional.cross_entropy(z, ids[1:], reduction="none", label_smoothing=0.1)[keep].sum()
        np.testing.assert_allclose(smooth[i], want.item(), rtol=FORWARD)
        wrong = z[keep].double().softmax(1) - torch.nn.functional.one_hot(ids[1:][keep], z.shape[1])
        np.testing.assert_allclose(error[i], wrong.norm(dim=1).sum().item(), rtol=4 * FORWARD)
        entropy = torch.distributions.Categorical(logits=z[keep].double()).entropy().sum().item()
        np.testing.assert_allclose(both.entropy[0, i], entropy, rtol=4 * FORWARD)
        np.testing.assert_allclose(focal[i], ((1 - torch.exp(-ce)) ** 2 * ce).sum().item(), rtol=4 * FORWARD)
    with pytest.raises(ValueError, match="token_loss"):
        row_losses(model, rows, token_budget=60, token_loss="mse")


def test_rows_longer_than_the_window_share_nothing() -> None:
    rows = random_rows(40, seed=7, prefix=10, shortest=1, longest=20)
    model = tiny_model("gemma3", sliding_window=20)
    shared = {int(i): p for index, p in plan(rows, 100, share=True, span=20) for i in index}
    assert {shared[i] > 0 for i, r in enumerate(rows) if len(r.input_ids) > 20} == {False}
    assert any(shared.values())
    np.testing.assert_allclose(row_losses(model, rows, token_budget=100).nll[0], one_by_one(model, rows), rtol=FORWARD)


def test_prefix_groups_are_common_unsupervised_beginnings() -> None:
    rows = mixed_rows()
    groups = prefix_groups(rows, np.arange(len(rows)))
    assert sorted(int(i) for members, _ in groups for i in members) == list(range(len(rows)))
    assert sorted(p for _, p in groups)[-2:] == [9, 12]
    for members, p in groups:
        assert len({tuple(rows[int(i)].input_ids[:p].tolist()) for i in members}) == 1
        assert not any(rows[int(i)].supervised[:p].any() for i in members)
    assert list(plan([], 100, share=True)) == []


def test_common_length_is_that_of_the_longest_common_beginning() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = [TinyRow(rng.integers(0, 2, int(rng.integers(1, 9))), np.zeros(9, bool)) for _ in range(3)]
        limit = min(int(rng.integers(0, 9)), *(len(r.input_ids) for r in rows))
        common = os.path.commonprefix([r.input_ids[:limit].tolist() for r in rows])
        assert common_length(rows, limit) == len(common)


def test_a_prefix_saves_tokens() -> None:
    rows = random_rows(32, seed=8, prefix=20)
    made = [packing.pack(rows, index, packed=True, prefix=p, trim=True) for index, p in plan(rows, 400, share=True)]
    assert sum(b.input_ids.numel() for b in made) < 0.75 * sum(len(r.input_ids) for r in rows)
    assert max(b.input_ids.numel() for b in made) <= 400


@pytest.mark.parametrize("pooling", ["last", "weighted_mean"])
def test_representations(architecture: str, pooling: str) -> None:
    rows, model = random_rows(7, seed=9), tiny_model(architecture)
    got = representations(model, rows, token_budget=50, pooling=pooling)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)[None]
        with torch.no_grad():
            states = model.get_decoder()(input_ids=ids).last_hidden_state[0].double()
        t = torch.arange(1, len(states) + 1, dtype=torch.float64)
        want = states[-1] if pooling == "last" else (states * t[:, None]).sum(0) / t.sum()
        np.testing.assert_allclose(got[i], want.numpy(), rtol=BACKWARD, atol=4 * FORWARD)
    plain = representations(tiny_model(architecture, attn="sdpa"), rows, token_budget=50, pooling=pooling)
    np.testing.assert_allclose(plain, got, rtol=BACKWARD, atol=4 * FORWARD)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_written_out_pass_gives_the_model_s_own_numbers(architecture: str) -> None:
    rows = [*mixed_rows(), TinyRow(np.arange(3, 12, dtype=np.int32), np.arange(9) == 4)]  # tokens after the last label
    model = tiny_lora(tiny_model(architecture))
    passes = written_passes(model, (False, True), merged_weights(model))
    assert passes is not None and len(passes) == 2
    for budget in (40, 300):
        got = row_losses(model, rows, token_budget=budget, adapters=(False, True))
        own = row_losses(model, rows, token_budget=budget, adapters=(False, True), shortcuts=Shortcuts(written=False))
        np.testing.assert_allclose(got.nll, own.nll, rtol=FORWARD)


def test_what_the_written_out_pass_does_not_serve_runs_the_model_s_own() -> None:
    assert written_passes(tiny_model("gemma3"), (True,), None) is None
    assert written_passes(tiny_lora(tiny_model("llama")), (True,), None) is None  # not merged
    assert written_passes(tiny_model("llama").bfloat16(), (True,), None) is None


def test_a_row_ends_before_its_last_supervised_token() -> None:
    row = TinyRow(np.arange(10, dtype=np.int32), np.isin(np.arange(10), (4, 6)))
    assert packing.needed(row) == 6
    batch = packing.pack([row], [0], packed=True, trim=True)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (batch.predict.tolist(), batch.labels.tolist()) == ([3, 5], [4, 6])
    assert packing.needed(TinyRow(row.input_ids, np.zeros(10, bool))) == 10


@pytest.mark.parametrize("chunk", [1, 700, 1 << 23])
def test_entropy_by_blocks_is_that_of_the_whole_vocabulary(chunk: int) -> None:
    """Sharp, flat and impossible words, over three and a half blocks of 256, against float64."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(5, 8, generator=g) * torch.tensor([0.0, 0.1, 1, 10, 100])[:, None],
        torch.randn(900, 8, generator=g),
    )
    bias = torch.zeros(900)
    bias[::7] = -torch.inf
    stats = head.head_stats(hidden, torch.ones(5, dtype=torch.int64), weight, bias, chunk=chunk, with_entropy=True)
    z = hidden.double() @ weight.double().T + bias.double()
    want = torch.special.entr(z.softmax(1)).sum(1)
    np.testing.assert_allclose(stats.entropy.numpy(), want.numpy(), rtol=1e-4, atol=1e-5)
    plain = head.stats_of_logits(lambda h: h @ weight.T + bias, hidden, torch.ones(5, dtype=torch.int64), 2)
    np.testing.assert_allclose(plain.entropy.numpy(), want.numpy(), rtol=1e-4, atol=1e-5)
