"""Putting a LoRA adapter on a loaded model and taking it off again, so that one model in memory serves both passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepset.model.load import load_adapter


@contextmanager
def attached(model: Any, path: Path) -> Iterator[Any]:
    """Yield a PeftModel of `model` with the adapter in folder `path`; the plain model is restored afterwards.

    Raises:
        ModelError: the folder holds no safetensors adapter.
    """
    adapted = load_adapter(model, path, trainable=True)
    try:
        yield adapted
    finally:
        adapted.unload()
