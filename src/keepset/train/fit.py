"""One training, by the loss that its section names: SFT on rows, or a preference loss on pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keepset.errors import RecipeError
from keepset.memory import free_memory
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.launch import LAUNCHED, launch
from keepset.train.preference import PairLoss, train_dpo
from keepset.train.sft import train_sft
from keepset.train.training import Training, TrainResult

if TYPE_CHECKING:
    from rich.console import Console

    from keepset.model.encode import Encoded

    Sides = tuple[Encoded, ...]


def fit(
    spec: ModelSpec,
    lora: LoraSpec,
    sides: Sequence[Sides],
    out: Path,
    args: TrainSpec,
    *,
    seed: int,
    moments: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Fine-tune the base by `args.loss`; see `Training`, `train_sft` and `train_dpo`.

    `sides` are n rows: (row,), or (chosen, rejected), of which `loss: sft` takes the chosen one. `moments` keeps every
    epoch's checkpoint with Adam's moments.

    Raises:
        RecipeError, DataError: as the two functions.
        ModelError: one of several processes failed.
    """
    return fit_training(Training(spec, lora, args, seed, moments, console=console), sides, out)


def fit_training(training: Training, sides: Sequence[Sides], out: Path) -> TrainResult:
    """`fit` of a training, whose rows may have weights; its arguments and what it raises are there."""
    args = training.args
    if args.num_processes > 1 and LAUNCHED not in os.environ:
        if training.weights is not None:
            raise RecipeError("train.num_processes: rows with weights are trained on in one process; set it to 1")
        launch(training, sides, out)  # what it left is found below
    try:
        if args.loss == "sft":
            return train_sft(training, [row[0] for row in sides], out)
        return train_dpo(training, [(row[0], row[1]) for row in sides], out, PairLoss.of(args.loss, args.beta))
    finally:
        free_memory()  # the trained model goes before the next one comes
