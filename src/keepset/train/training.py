"""What a training is: what is trained, from what, with which arguments; and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import DataError, RecipeError
from keepset.model.load import load as load_causal
from keepset.model.load import resolve
from keepset.model.weights import fingerprint
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.runfolder.files import canonical, digest

if TYPE_CHECKING:
    from rich.console import Console

    from keepset.model.encode import Encoded

WORK = "trainer"
"""The trainer's own checkpoints, inside the result folder while training goes on."""


@dataclass(frozen=True)
class Training:
    """One training, whatever its loss and its rows.

    Attributes:
        model: the base.
        lora: the adapter; not looked at with `args.full`.
        args: epochs, rate, batch; `args.extra` goes to TRL's configuration.
        seed: of adapter initialisation, row order and dropout.
        moments: keep every epoch's checkpoint as `checkpoint-<step>` with Adam's moments.
        resume: False trains anew whatever lies in the result folder.
        console: where progress is shown; None shows none.
        weights: how much each row counts in the loss; None: every row as 1. A batch's loss is Σ weight · loss of its
            rows over the number of all its tokens (or pairs), so that order, steps and the other rows' parts of it are
            the same whatever the weights. Rows of weight 0 are not run.
    """

    model: ModelSpec
    lora: LoraSpec
    args: TrainSpec
    seed: int = 0
    moments: bool = False
    resume: bool = True
    console: Console | None = None
    weights: Sequence[float] | None = None

    def plan(self, rows: Sequence[Encoded], base: str, *more: Any) -> str:
        """Hash everything that the result depends on.

        `rows` are what is trained on, pairs as their sides, one after the other; `base` is `Base.weights`, `more` what
        the kind of training adds.
        """
        tokens = [digest(np.asarray(r.input_ids, dtype=np.int32).tobytes() + r.supervised.tobytes()) for r in rows]
        parts = {"model": self.model.model_dump(mode="json"), "args": self.args.key(), "rows": digest(tokens),
                 "seed": self.seed, "base": base}  # fmt: skip
        lora = None if self.args.full else self.lora.model_dump()
        weights = {} if self.weights is None else {"weights": [float(w) for w in self.weights]}
        return digest(canonical({**parts, **weights, "lora": lora, "more": list(more)}))

    def columns(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of the rows that a trainer reads, with their weights where there are any.

        Raises:
            ValueError: not one weight a row.
        """
        if self.weights is None:
            return columns
        n = len(next(iter(columns.values())))
        if len(self.weights) != n:
            raise ValueError(f"{len(self.weights)} weights for {n} rows")
        return {**columns, "weight": [float(w) for w in self.weights]}

    def require_own(self, own: bool) -> None:
        """Refuse weights where TRL's own step, which has none, would be taken.

        Raises:
            RecipeError: as said.
        """
        if self.weights is not None and not own:
            raise RecipeError(
                "rows are masked or weighted in keepset's own training step only, in one process, without mixed "
                "precision, packing or TRL's other losses; remove what asks for those"
            )


@dataclass(frozen=True)
class Base:
    """The model that a training starts from; it is loaded only where there is something to train.

    Attributes:
        weights: hash of the weights; a name alone would stay when the folder gets others.
        load: gives the model, which the training changes, and its tokenizer.
    """

    weights: str
    load: Callable[[], tuple[Any, Any]]

    @staticmethod
    def of(spec: ModelSpec, load: Callable[[], tuple[Any, Any]] | None = None) -> Base:
        """The model of a recipe's section, loaded as a causal LM or by `load`.

        Raises:
            ModelError: nothing there, or as `weights.fingerprint`.
        """

        def causal() -> tuple[Any, Any]:
            loaded = load_causal(spec)
            return loaded.model, loaded.tokenizer

        return Base(fingerprint(resolve(spec), spec.model_revision, code=spec.trust_remote_code), load or causal)


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        path: folder with adapter_model.safetensors (or the whole model) and training.json.
        steps: optimiser steps.
        tokens: tokens run through the model, prompts and every epoch included.
        supervised_tokens: those of them that count in the loss; None after TRL's own step, which doesn't count them.
        seconds: of training, over all sessions if it was resumed.
        losses: one a logged step, in nats a supervised token (DPO: nats a pair).
    """

    path: Path
    steps: int
    tokens: int
    supervised_tokens: int | None
    seconds: float
    losses: list[float]


def check_rows(rows: Sequence[Encoded]) -> None:
    """Refuse an empty training set and rows without a supervised token.

    Raises:
        DataError: as said.
    """
    if not rows:
        raise DataError("no rows to train on")
    empty = [i for i, row in enumerate(rows) if not np.asarray(row.supervised).any()]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} training rows have no supervised token, the first is row {empty[0]}"
        )
