"""One training, by the loss that its section names: SFT on rows, or a preference loss on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keepset.memory import free_memory
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
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
    """
    training = Training(spec, lora, args, seed, moments, console=console)
    try:
        if args.loss == "sft":
            return train_sft(training, [row[0] for row in sides], out)
        return train_dpo(training, [(row[0], row[1]) for row in sides], out, PairLoss.of(args.loss, args.beta))
    finally:
        free_memory()  # the trained model goes before the next one comes
