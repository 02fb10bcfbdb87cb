"""The warm-up of LESS and ROSE: a LoRA on a random share of the pool, a checkpoint an epoch with Adam's moments.

Each checkpoint's weight in the influence sum is the mean learning rate of its epoch. LESS takes the rate that the
trainer logs, which is the scheduler's after the step; so does `mean_lr` (the rate used in the step differs by 1-3 %).
LESS's own `--data_seed` did not choose the subset; here the seed does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keepset.errors import ModelError
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.row_ids import Ids, id_order
from keepset.runfolder import layout

if TYPE_CHECKING:
    from rich.console import Console

    from keepset.model.encode import Encoded


@dataclass(frozen=True)
class Checkpoint:
    """A warm-up checkpoint: a PEFT adapter folder with `adam.safetensors` and `meta.json`.

    Attributes:
        path: the folder.
        mean_lr: mean learning rate of its epoch.
        step: optimiser steps taken.
    """

    path: Path
    mean_lr: float
    step: int


def pick_subset(ids: Ids | Sequence[str] | np.ndarray, fraction: float, seed: int, *, min_rows: int = 1) -> np.ndarray:
    """Draw the warm-up rows: `max(min_rows, ⌊fraction · n⌋)` of n, without replacement, from `default_rng(seed)`.

    The draw is over the sorted ids, so a pool in another order gives the same rows, in the same order. Returns indices
    into `ids`, sorted by id.
    """
    order = id_order(ids)
    n = len(order)
    k = min(n, max(min_rows, int(fraction * n + 1e-9)))
    drawn = np.random.default_rng(seed).choice(n, size=k, replace=False)
    return order[np.sort(drawn)]


def warmup(
    spec: ModelSpec,
    lora: LoraSpec,
    rows: Sequence[tuple[Encoded, ...]],
    out: Path,
    args: TrainSpec,
    *,
    seed: int,
    console: Console | None = None,
) -> list[Checkpoint]:
    """Train the warm-up adapter on `rows` (see `pick_subset`) and return its checkpoints, one an epoch.

    The rows' sides are as `keepset.train.fit.fit` takes them; checkpoints are `out/checkpoint-<step>`.

    Raises:
        ModelError: an optimiser without Adam moments.
        DataError, RecipeError: see `fit`.
    """
    from keepset.train.fit import fit

    fit(spec, lora, rows, out, args, seed=seed, moments=True, console=console)
    return list_checkpoints(out)


def list_checkpoints(out: Path) -> list[Checkpoint]:
    """Return the checkpoints in a warm-up folder, by step.

    Raises:
        ModelError: there is none.
    """
    checkpoints = []
    for meta_path in Path(out).glob(f"checkpoint-*/{layout.META}"):
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        checkpoints.append(Checkpoint(meta_path.parent, float(meta["mean_lr"]), int(meta["step"])))
    if not checkpoints:
        raise ModelError(f"{out}: no warm-up checkpoint (checkpoint-*/meta.json) in this folder")
    return sorted(checkpoints, key=lambda c: c.step)
