"""The recipe of a whole small job on the tiny model and data of `conftest.py`, and what writes and prints them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from keepset.recipe import parse_recipe

TRAIN = {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4}


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(model_folder, data, run_dir, **more):
    return parse_recipe(
        {
            "run_dir": str(run_dir),
            "model": {"model_name_or_path": str(model_folder), "max_length": 200},
            "lora": {"lora_r": 2, "lora_alpha": 4},
            "pool": data["pool"],
            "target": data["target"],
            "methods": ["rose", "less", "davir"],
            "budget": "25%",
            "warmup": {**TRAIN, "num_train_epochs": 2, "fraction": 0.3},
            "reference": TRAIN,
            "train": TRAIN,
            "evaluate": {"pairs": [{"path": data["pairs"]}], "heldout": [{"path": data["rows"]}], "bootstrap": 100},
            "controls": {"random_seeds": [0, 1], "longest": True, "full": True},
            "batching": {"token_budget": 256, "shard_rows": 8},
            **more,
        }
    )


def quiet():
    return Console(file=io.StringIO(), width=200)
