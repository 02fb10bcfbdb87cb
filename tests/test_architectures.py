"""A model's numbers are transformers' own, or the model is refused: one architecture for each kind of attention, head,
position and state (`make architectures` runs them all)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import architectures  # noqa: E402

KINDS = {
    "gpt2": "packed",  # learned positions, Conv1D
    "gemma3_text": "packed",  # windows by layer
    "qwen2, windows above a layer": "packed",
    "phi3, LongRoPE": "packed",  # positions by the longest row
    "cohere, scale": "packed",  # logits scaled
    "granite, multipliers": "packed",
    "mixtral": "packed",  # experts
    "bert": "packed, own head",  # a head with layers of its own
    "gpt_oss": "padded",  # attention sinks
    "gemma2, caps that bite": "padded",  # soft caps
    "bloom": "padded",  # ALiBi, attention code of its own
    "falcon": "padded",  # attention class picked by name
    "gptj": "padded",
    "deepseek_v3": "padded",  # latent attention
    "glm_moe_dsa": "padded",  # sparse attention
    "llama4_text": "padded",  # chunks
    "mamba": "padded",  # recurrent state
    "falcon_h1": "padded",
    "lfm2, convolutions": "padded",  # convolutions
    "recurrent_gemma": "padded, own head",  # a soft cap of another name
}


@pytest.mark.parametrize(("name", "how"), KINDS.items())
def test_losses_states_and_gradients_are_transformers_own(name: str, how: str, tokenizer: Any) -> None:
    torch.set_num_threads(1)
    found = architectures.sweep(name, tokenizer)
    assert found.status == "equal", found
    assert found.how == how


def saved(folder: Path, tokenizer: Any, name: str, **changes: Any) -> Any:
    model = architectures.tiny_model(name, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from keepset.errors import ModelError
    from keepset.model.load import load
    from keepset.recipe import ModelSpec

    saved(tmp_path, tokenizer, "bert", is_decoder=False)
    with pytest.raises(ModelError, match="those after it"):
        load(ModelSpec(model_name_or_path=str(tmp_path), device="cpu"))


def test_an_engine_that_is_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets its scale, then nothing that agrees: padded, then refused."""
    from conftest import tiny_model
    from keepset.errors import ModelError
    from keepset.model import attention
    from keepset.model import pack as packing
    from keepset.model.check import check

    packed = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: packed(*a, **{**k, "scale": 0.9}))
    assert not check(tiny_model("llama")).packed
    states = packing._states
    monkeypatch.setattr(packing, "_states", lambda *a: states(*a) * 1.01)
    with pytest.raises(ModelError, match="LlamaForCausalLM .llama.: keepset's losses do not agree"):
        check(tiny_model("llama"))


def test_attention_never_leaves_an_argument_out() -> None:
    from keepset.model.attention import Segments, keepset_attention

    q = torch.randn(1, 2, 5, 4)
    given = {"attention_mask": None, "keepset_segments": Segments.of([3, 2]), "position_ids": torch.arange(5)[None]}
    keepset_attention(torch.nn.Module(), q, q, q, **given)
    for name in ("s_aux", "softcap", "position_bias", "a_new_one"):
        with pytest.raises(ValueError, match=name):
            keepset_attention(torch.nn.Module(), q, q, q, **given, **{name: torch.ones(2)})


def test_a_window_that_no_probe_reaches_is_read_from_the_configuration() -> None:
    """A layer said to slide that hands no window to its attention is not packed, however wide the window."""
    from conftest import tiny_model
    from keepset.model.check import check

    model = tiny_model("mistral", sliding_window=200)
    assert check(model).packed
    model.model.layers[0].self_attn.sliding_window = None
    model.config.sliding_window = 200
    for layer in model.model.layers:
        layer.self_attn.forward = _without_window(layer.self_attn)
    assert not check(model).packed


def _without_window(module: Any) -> Any:
    own = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        window, module.config.sliding_window = module.config.sliding_window, None
        try:
            return own(module, *args, **kwargs)
        finally:
            module.config.sliding_window = window

    return forward


@pytest.mark.parametrize("packed", [True, False])
def test_longrope_rows_at_the_limit(packed: bool) -> None:
    """Rows one token below, at and beyond the limit, alone and beside each other, trimmed or not."""
    from keepset.features.losses import row_losses
    from keepset.model import pack as packing

    name, changes = architectures.VARIANTS["llama, LongRoPE"]
    model = architectures.tiny_model(name, **changes)
    if packed:
        from keepset.model import attention

        model.set_attn_implementation(attention.NAME)
    rng = np.random.default_rng(3)
    rows = []
    for length in (23, 24, 25, 26, 40, 12, 25, 24):
        supervised = np.zeros(length, dtype=bool)
        supervised[length // 2] = supervised[length - 2] = True  # trimmed, 25 and 26 would fall below the limit
        rows.append(architectures.Row(rng.integers(5, 390, length).astype(np.int32), supervised))
    assert packing.engine(model).apart == 24 and packing.engine(model).packed is packed
    got = row_losses(model, rows, token_budget=300).nll[0]
    want = [x.sum() for x in architectures.own_losses(model, rows)]
    assert np.allclose(got, want, rtol=1e-5)
    for i, row in enumerate(rows):
        assert np.isclose(row_losses(model, [row], token_budget=300).nll[0, 0], got[i], rtol=1e-6)


def together(peft: Any, rows: list[Any], uniform: Any = None) -> tuple[Any, list[Any]]:
    """Token losses and each row's flat gradient of its mean loss, of one call of `run_rows`."""
    from keepset.features.gradients import mean_weights, products, recording, run_rows

    found: dict[str, Any] = {}

    def sink(name: str, left: Any, right: Any, scale: float, places: Any) -> None:
        out = torch.empty(len(rows), left.shape[1], right.shape[1])
        found[name] = products(left, right, places, out) * scale

    with recording(peft) as recorder:
        nll, _ = run_rows(peft, recorder, rows, mean_weights, sink, uniform)
        return nll, [torch.cat([found[n][i].flatten() for n in recorder.shapes]) for i in range(len(rows))]


def adapted(model: Any, targets: Any = "all-linear") -> Any:
    from keepset.model.load import apply_lora
    from keepset.recipe import LoraSpec

    peft = apply_lora(model, LoraSpec(lora_r=2, lora_target_modules=targets), 0).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return peft


@pytest.mark.parametrize("name", ["llama, LongRoPE", "glm_moe_dsa"])
def test_gradients_of_rows_that_run_apart(name: str) -> None:
    """A pair's sides, some longer than other rows allow: as autograd's, one row at a time."""
    model_type, changes = architectures.VARIANTS.get(name, (name, {}))
    targets = ["q_proj", "o_proj"] if model_type == "llama" else ["o_proj", "q_b_proj"]
    peft = adapted(architectures.tiny_model(model_type, **changes), targets)
    rng = np.random.default_rng(5)
    rows = [architectures.Row(rng.integers(5, 390, n), np.arange(n) > n // 2) for n in (10, 30, 41, 24)]
    nll, got = together(peft, rows)
    assert architectures.relative(nll, np.concatenate(architectures.own_losses(peft, rows))) < 1e-5
    for g, w in zip(got, architectures.own_gradients(peft, rows), strict=True):
        assert float((g - w).norm() / w.norm()) < 1e-4


def test_labels_drawn_where_the_head_is_the_models_own_code() -> None:
    """Each is where the distribution function of the model's own softmax passes the number; gradients follow."""
    peft = adapted(architectures.tiny_model("minicpm3"))
    rng = np.random.default_rng(6)
    rows = [architectures.Row(rng.integers(5, 390, n), np.arange(n) > n // 2) for n in (9, 14)]
    uniform = torch.from_numpy(rng.random(sum(int(r.supervised.sum()) for r in rows)))
    nll, got = together(peft, rows, uniform)
    lora, place, losses = [p for n, p in peft.named_parameters() if "lora_" in n], 0, []
    for row, g in zip(rows, got, strict=True):
        logits = peft.get_base_model()(input_ids=torch.as_tensor(row.input_ids)[None], use_cache=False).logits[0, :-1]
        logits = logits[torch.as_tensor(row.supervised[1:])]
        below = logits.detach().double().softmax(-1).cumsum(-1).numpy()
        drawn = [int((b < u).sum()) for b, u in zip(below, uniform[place : place + len(below)].numpy(), strict=True)]
        place += len(below)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(drawn), reduction="none")
        losses.append(loss.detach())
        want = torch.cat([x.flatten() for x in torch.autograd.grad(loss.mean(), lora)])
        assert float((g - want).norm() / want.norm()) < 1e-4
    assert architectures.relative(nll, torch.cat(losses)) < 1e-5


def test_rows_beyond_the_positions_of_a_model(tmp_path: Path, tokenizer: Any) -> None:
    """MPT's are called max_seq_len: such rows are quarantined, and a model's own failure is one line."""
    from transformers import AutoConfig

    from keepset.errors import ModelError
    from keepset.features.losses import row_losses
    from keepset.model.load import context_length

    model = architectures.tiny_model("mpt", max_seq_len=40)
    assert context_length(model.config) == 40
    assert context_length(AutoConfig.for_model("gpt2", n_positions=48)) == 48
    assert context_length(AutoConfig.for_model("bloom")) is None
    rows = [architectures.Row(np.arange(5, 60, dtype=np.int32), np.arange(55) > 9)]
    with pytest.raises(ModelError, match="mpt: its own code can't run rows of 54 tokens"):
        row_losses(model, rows, token_budget=100)


def test_weights_that_are_not_finite_are_named() -> None:
    from keepset.errors import ModelError
    from keepset.model.check import check

    model = architectures.tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite; model.layers.1.mlp.up_proj.weight of the checkpoint is not"):
        check(model)


def test_what_a_load_says_is_said_once(
    tmp_path: Path, tokenizer: Any, capsys: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads and two adapters under the command line's own handler; transformers' reports are not shown."""
    import logging

    from keepset import cli
    from keepset.model import load as model
    from keepset.model.load import apply_lora, load
    from keepset.recipe import LoraSpec, ModelSpec

    def twice(**_: Any) -> None:
        for _ in range(2):
            apply_lora(load(ModelSpec(model_name_or_path=str(tmp_path), device="cpu")).model, LoraSpec(), 0)

    saved(tmp_path, tokenizer, "bloom")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("transformers.distributed.tensor_parallel"), "handlers", [caplog.handler])
    monkeypatch.setattr(model, "_ENGINES", {})
    monkeypatch.setattr(cli, "app", twice)
    monkeypatch.setattr(cli, "stop_on_signals", lambda: None)
    cli.main()
    said = capsys.readouterr().err
    assert said.count("can't be run packed") == 1 and said.count("are called query_key_value") == 1
    assert not caplog.messages  # such as which layers were not sharded
