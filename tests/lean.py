"""What makes tiny trainings and forks quick: they take a second, and libraries spend half of it beside the point."""

from __future__ import annotations

import gc
import sys
from typing import Any

# PEFT and TRL write a model card beside every checkpoint; nothing reads it, and it is a quarter of a tiny training.
CARDS = {
    "peft.peft_model": ("PeftModel", "create_or_update_model_card"),
    "trl.trainer.base_trainer": ("_BaseTrainer", "create_model_card"),
}


def nothing(*args: Any, **more: Any) -> None:
    """Stand in for a card."""


def lean() -> None:
    """Leave cards out, and take what is imported out of the collector's sight: trainings ask for full collections."""
    for module, (kind, method) in CARDS.items():
        if module in sys.modules:
            found = getattr(sys.modules[module], kind)
            assert callable(getattr(found, method))
            setattr(found, method, nothing)
    gc.collect()
    gc.freeze()
