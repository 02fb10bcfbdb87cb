"""A model's shape from its config alone, against the model itself."""

from __future__ import annotations

import pytest

from conftest import save_tiny, tiny_lora
from keepset.errors import ModelError
from keepset.model.flops import flops, matrix_weights
from keepset.model.load import load
from keepset.model.outline import adapter_numbers, outline, weight_bytes
from keepset.recipe import LoraSpec, ModelSpec


def test_an_outline_counts_as_the_model_does(architecture, tmp_path):
    save_tiny(tmp_path, architecture)
    spec = ModelSpec(model_name_or_path=str(tmp_path))
    real = load(spec).model
    (tmp_path / "model.safetensors").unlink()
    shape = outline(spec).model
    assert matrix_weights(shape) == matrix_weights(real)
    assert flops(shape, 100, 7, passes=2) == flops(real, 100, 7, passes=2)
    assert weight_bytes(shape) == sum(p.numel() * 4 for p in real.parameters())
    trained = sum(p.numel() for name, p in tiny_lora(real, r=4).named_parameters() if "lora_" in name)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert adapter_numbers(shape, LoraSpec(lora_r=4, lora_target_modules=targets)) == trained


def test_an_outline_has_the_dtype_and_no_memory(tmp_path):
    save_tiny(tmp_path)
    wide, narrow = (outline(ModelSpec(model_name_or_path=str(tmp_path), dtype=d)) for d in ("float32", "bfloat16"))
    assert weight_bytes(wide.model) == 2 * weight_bytes(narrow.model)
    assert all(p.is_meta for p in wide.model.parameters())
    assert len(wide.encoder.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).input_ids)


def test_a_folder_without_weights_is_still_refused_where_a_model_is_run(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no .safetensors weights"):
        load(ModelSpec(model_name_or_path=str(tmp_path)))


def test_a_folder_without_a_config_has_no_outline(tmp_path):
    with pytest.raises(ModelError, match="no config.json"):
        outline(ModelSpec(model_name_or_path=str(tmp_path)))
