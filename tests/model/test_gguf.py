"""Converted models: once, whole or not at all, in the folder the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_model, tiny_tokenizer
from keepset.errors import ModelError
from keepset.model import gguf
from keepset.model.load import load
from keepset.recipe import ModelSpec


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stand a tiny model in for what transformers reads out of a GGUF; list the conversions."""
    made: list[str] = []
    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(folder: str, *, gguf_file: str | None = None, **options: Any) -> Any:
        if gguf_file is None:
            return load_model(folder, **options)
        made.append(gguf_file)
        if Path(folder, gguf_file).read_bytes() == b"bad":
            raise ValueError("not a known architecture\nsecond line")
        return tiny_model("llama"), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def tokenizer(folder: str, *, gguf_file: str | None = None, **options: Any) -> Any:
        return load_tokenizer(folder, **options) if gguf_file is None else tiny_tokenizer()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setenv("KEEPSET_CACHE", str(tmp_path / "cache"))
    return made


def test_a_file_is_converted_once_and_again_when_its_bytes_change(calls: list[str], tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"one")
    first = load(ModelSpec(model_name_or_path=str(file)))
    assert load(ModelSpec(model_name_or_path=str(file))).fingerprint == first.fingerprint
    assert calls == ["tiny.gguf"]
    file.write_bytes(b"two")
    gguf.gguf_folder(file)
    assert calls == ["tiny.gguf"] * 2
    kept = sorted(p.name for p in gguf.cache_folder().iterdir() if not p.name.endswith(".lock"))
    assert len(kept) == 2 and all(name.startswith("tiny-") for name in kept)


def test_a_failed_conversion_leaves_nothing(calls: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"bad")
    with pytest.raises(ModelError, match="not a known architecture") as error:
        gguf.gguf_folder(file)
    assert "\n" not in str(error.value)
    assert [p.name for p in gguf.cache_folder().iterdir() if p.is_dir()] == []


def test_a_half_made_folder_of_a_killed_run_is_not_used(calls: list[str], tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"one")
    final = gguf.cache_folder() / "tiny"
    (final.parent / ".tiny.123.part").mkdir(parents=True)
    assert gguf.convert(file, final) == final and calls == ["tiny.gguf"]
    assert (final / "model.safetensors").is_file()
