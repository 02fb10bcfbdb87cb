"""Putting a LoRA adapter on a loaded model and taking it off again, so that one model in memory serves both passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepset.errors import ModelError


@contextmanager
def attached(model: Any, path: Path) -> Iterator[Any]:
    """Yield a PeftModel of `model` with the adapter in folder `path`; the plain model is restored afterwards.

    Raises:
        ModelError: the folder holds no safetensors adapter.
    """
    from peft import PeftModel

    if not (path / "adapter_config.json").exists() or not (path / "adapter_model.safetensors").exists():
        raise ModelError(f"{path}: no LoRA adapter (adapter_config.json and adapter_model.safetensors) in this folder")
    adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True)
    adapted.eval()
    try:
        yield adapted
    finally:
        adapted.unload()
