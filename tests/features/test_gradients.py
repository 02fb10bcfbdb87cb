"""Per-example gradients of one batched backward against one-at-a-time autograd, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import TinyRow, random_rows, tiny_lora, tiny_model  # noqa: E402
from keepset.errors import ModelError  # noqa: E402
from keepset.features.gradients import mean_weights, recording, run_rows  # noqa: E402
from keepset.features.recorded import products  # noqa: E402
from keepset.model.prefix import common_prefix  # noqa: E402
from slow_gradients import mean_nll_gradient  # noqa: E402
from tolerance import BACKWARD  # noqa: E402


class Collect:
    """A sink that keeps every gradient whole."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def __call__(self, name, left, right, scale, places) -> None:
        out = torch.empty(len(places.lengths), left.shape[1], right.shape[1])
        assert name not in self.grads
        self.grads[name] = products(left, right, places, out) * scale


def batched(model, rows, *, packed=True, served=None, **options):
    sink = Collect()
    with recording(model, **options) as recorder:
        assert served is None or (recorder.written is not None) == served
        if not packed:
            recorder.packed, recorder.written = False, None
        run_rows(model, recorder, rows, mean_weights, sink)
        assert set(sink.grads) == set(recorder.shapes)
        assert all(tuple(sink.grads[n].shape[1:]) == s for n, s in recorder.shapes.items())
    return sink.grads


def assert_same(model, rows, grads, tolerance=BACKWARD):
    names = list(grads)
    for i, row in enumerate(rows):
        want = mean_nll_gradient(model, names, row)
        norm = float(torch.cat([w.view(-1) for w in want.values()]).norm())
        for name in names:
            assert float((grads[name][i] - want[name]).norm()) <= tolerance * norm, (i, name)
    assert norm > 1e-3


@pytest.mark.parametrize("packed", [True, False])
def test_lora_gradients_are_autograds(model, packed) -> None:
    peft, rows = tiny_lora(model), random_rows(6, seed=2)
    assert_same(peft, rows, batched(peft, rows, packed=packed))


def lora_on(model, targets, r=4, **changes):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    conv = model.config.model_type == "gpt2"
    config = LoraConfig(r=r, lora_alpha=4, target_modules=targets, fan_in_fan_out=conv, **changes)
    peft = get_peft_model(model, config)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return peft.eval()


@pytest.mark.parametrize("r", [1, 40])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ["v_proj"]), ("llama", "all-linear"), ("gpt2", "all-linear"), ("gemma3", ["gate_proj", "down_proj"])],
)
def test_any_rank_and_any_target_modules(architecture, targets, r) -> None:
    peft, rows = lora_on(tiny_model(architecture), targets, r, use_rslora=r == 40), random_rows(4, seed=3)
    assert_same(peft, rows, batched(peft, rows))


def test_lora_on_an_untied_head() -> None:
    peft = lora_on(tiny_model("llama", tie_word_embeddings=False), ["q_proj", "lm_head"])
    rows = random_rows(3, seed=4)
    grads = batched(peft, rows)
    assert any("lm_head" in n for n in grads)
    assert_same(peft, rows, grads)


@pytest.mark.parametrize("packed", [True, False])
def test_full_matrices_of_the_last_layer(model, packed) -> None:
    rows = random_rows(4, seed=5)
    grads = batched(model, rows, packed=packed, matrices=["*.layers.1.*", "*.h.1.*"])
    assert all(".1." in n for n in grads) and len(grads) >= 4
    assert_same(model, rows, grads)


def test_full_head_matrix() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=False)
    rows = random_rows(3, seed=6)
    assert_same(model, rows, batched(model, rows, matrices=["lm_head"]))
    with pytest.raises(ModelError, match="shares its weight with the input embedding"):
        batched(tiny_model("qwen2"), rows, matrices=["lm_head"])


def test_backward_stops_below_the_lowest_recorded_layer() -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(4, seed=7)
    whole, top = batched(peft, rows), batched(peft, rows, last_layers=1)
    assert {n for n in whole if ".layers.1." in n} == set(top)
    for name, value in top.items():
        assert float((value - whole[name]).norm()) <= BACKWARD * float(whole[name].norm())
    seen = []
    peft.get_base_model().model.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
    batched(peft, rows, last_layers=1, written=False)
    assert not torch.as_tensor(seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]).requires_grad


def test_gradient_checkpointing_gives_the_same_numbers() -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(4, seed=8)
    want = batched(peft, rows)
    peft.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    peft.train()
    got = batched(peft, rows)
    assert all(float((got[n] - want[n]).norm()) <= BACKWARD * float(want[n].norm()) for n in want)


def test_everything_is_put_back() -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(3, seed=9)
    flags = {n: p.requires_grad for n, p in peft.named_parameters()}
    values = {n: p.detach().clone() for n, p in peft.named_parameters()}
    batched(peft, rows)
    assert flags == {n: p.requires_grad for n, p in peft.named_parameters()} and any(flags.values())
    assert all(p.equal(values[n]) and p.grad is None for n, p in peft.named_parameters())
    assert not any("forward" in vars(m) for m in peft.modules())


def test_bfloat16_weights_give_float32_products() -> None:
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(4, seed=10)
    want = batched(peft, rows)
    got = batched(peft.to(torch.bfloat16), rows)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.cosine_similarity(value.view(-1), want[name].view(-1), dim=0) > 0.98


def test_refusals() -> None:
    rows = random_rows(2)
    with pytest.raises(ModelError, match="DoRA"):
        batched(lora_on(tiny_model("llama"), ["q_proj"], use_dora=True), rows)
    with pytest.raises(ModelError, match="embedding"):
        batched(lora_on(tiny_model("llama", tie_word_embeddings=False), ["embed_tokens", "q_proj"]), rows)
    with pytest.raises(ModelError, match="modules_to_save"):
        saved = lora_on(tiny_model("llama", tie_word_embeddings=False), ["q_proj"], modules_to_save=["lm_head"])
        batched(saved, rows)
    with pytest.raises(ModelError, match="has no LoRA"):
        batched(tiny_model("llama"), rows)
    with pytest.raises(ModelError, match="no weight matches"):
        batched(tiny_model("llama"), rows, matrices=["nothing.*"])
    dropout = lora_on(tiny_model("llama"), ["q_proj"], lora_dropout=0.1)
    batched(dropout, rows)  # eval mode: off
    with pytest.raises(ModelError, match="dropout 0.1 is active"):
        batched(dropout.train(), rows)
    merged = tiny_lora(tiny_model("llama"))
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        batched(merged, rows)
    two = tiny_lora(tiny_model("llama"))
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="2 active adapters"):
        batched(two, rows)


SERVED = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize("prefix", [0, 3, 9])
def test_written_pass_is_autograds(architecture, prefix) -> None:
    """Rows short enough for Mistral's window; a shared beginning of 9 tokens goes forward once."""
    model = tiny_model(architecture, **({"sliding_window": 64} if architecture == "mistral" else {}))
    peft, rows = lora_on(model, "all-linear"), random_rows(6, seed=31, prefix=prefix)
    grads = batched(peft, rows, served=True)
    assert_same(peft, rows, grads)
    plain = batched(peft, rows, written=False, served=False)
    assert all(float((grads[n] - plain[n]).norm()) <= BACKWARD * float(plain[n].norm()) for n in plain)


@pytest.mark.parametrize("architecture", SERVED)
def test_written_pass_stops_early_and_takes_full_matrices(architecture) -> None:
    model = tiny_model(architecture, **({"sliding_window": None} if architecture == "mistral" else {}))
    rows = random_rows(5, seed=32, prefix=6)
    assert_same(model, rows, batched(model, rows, served=True, matrices=["*.layers.1.*"]))
    peft = lora_on(model, ["k_proj", "up_proj"])
    assert_same(peft, rows, batched(peft, rows, served=True, last_layers=1))


def test_shared_beginning_ends_before_anything_supervised() -> None:
    rows = random_rows(4, seed=33, prefix=8)
    assert common_prefix(rows) == 7  # position 7 may predict a supervised token
    assert common_prefix(rows[:1]) == 0 and common_prefix(random_rows(4, seed=34)) == 0
    ids = rows[0].input_ids
    twins = [TinyRow(ids[:9], np.arange(9) == 8), TinyRow(ids[:9], np.arange(9) == 8)]
    peft = tiny_lora(tiny_model("llama"))
    assert_same(peft, twins, batched(peft, twins, served=True))


def test_rows_longer_than_the_window_take_autograd() -> None:
    peft, rows = tiny_lora(tiny_model("mistral")), random_rows(4, seed=35, shortest=10, prefix=5)
    assert_same(peft, rows, batched(peft, rows, served=True))
