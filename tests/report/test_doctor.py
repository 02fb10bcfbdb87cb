"""`keepset doctor`: the model's own numbers, and what is wrong in words."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from rich.console import Console  # noqa: E402

from conftest import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402
from keepset.report.doctor import examine, print_examination  # noqa: E402


def test_a_model_that_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    facts = examine(str(tmp_path))
    assert facts["problems"] == [] and facts["versions"]["torch"] == torch.__version__
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    tokenizer, model = tiny_tokenizer(), facts["model"]
    assert model["loads"] and model["architecture"] == "llama"
    assert model["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert model["supervised"] == len(tokenizer("2<|im_end|>").input_ids)
    assert model["tokens"] == len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids)
    out = io.StringIO()
    print_examination(facts, Console(file=out, width=200))
    printed = dict(line.rsplit(maxsplit=1) for line in out.getvalue().splitlines() if line.startswith("model "))
    assert {name.split()[1]: value for name, value in printed.items()} == {k: str(v) for k, v in model.items()}


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = examine(str(tmp_path / "none"))
    assert facts["offline"] and not facts["model"]["loads"]
    (problem,) = facts["problems"]
    assert str(tmp_path / "none") in problem
    out = io.StringIO()
    print_examination(facts, Console(file=out, width=200))
    assert f"problem: {problem}" in out.getvalue().splitlines()
