"""A run that scores, trains and evaluates holds one whole model at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
from rich.console import Console

from keepset.model import load as model_load
from keepset.pipeline import run_recipe
from tiny_recipe import TRAIN, recipe


@pytest.mark.parametrize("full", [False, True])
def test_no_second_model_is_in_memory(full, model_folder, data, tmp_path, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    counts, real = [], model_load.load

    def load(*args, **options):
        loaded = real(*args, **options)
        alive.add(loaded.model)
        counts.append(len(alive))
        return loaded

    gc.collect()
    monkeypatch.setattr(model_load, "load", load)
    made = recipe(
        model_folder, data, tmp_path, methods=["davir", {"name": "less", "shots": 1}], budget=4,
        reference={**TRAIN, "full": full}, train={**TRAIN, "full": full},
        controls={"random_seeds": [], "longest": False},
    )  # fmt: skip
    quiet = Console(quiet=True)
    run_recipe(made, console=quiet, out=quiet)
    assert len(counts) > 3 and max(counts) == 1
