"""Summed losses of rows under the base, the reference, a fold's reference, or a checkpoint of the warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keepset.data.ids import fold_of
from keepset.errors import RecipeError
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops
from keepset.runfolder.files import digest
from keepset.runfolder.shards import Arrays
from keepset.stages.rows import Rows
from keepset.stages.stage import VERSION, Batch, Stage, Sweep, Work, fetch
from keepset.stages.trained import Reference, WarmupCheckpoint, weights_of

if TYPE_CHECKING:
    from keepset.features.losses import TokenLoss
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job

Model = Literal["base", "reference", "fold", "checkpoint"]
Of = Literal["chosen", "rejected", "content", "alone"]
SUFFIX = {"chosen": "", "rejected": "-rejected", "content": "-content", "alone": ""}
PRICED = {
    "content": "losses without ends of turns", "rejected": "losses of the rejected sides",
    "alone": "losses of answers alone",
}  # fmt: skip
"""What `plan` calls losses of other rows than the chosen sides, under base and reference together."""


@dataclass(frozen=True)
class Losses(Sweep):
    """Summed loss of each row in nats (`nll`, (n,) float64) under one model, and its supervised tokens (`n_tokens`).

    With the token loss `entropy` also the summed entropy of the predictions in nats (`entropy`).

    Attributes:
        model: which.
        token_loss: what is summed (see `features.losses`).
        of: which tokens of the pool's rows (see `Job.rows_of`).
        at: the fold, from 0; or the checkpoint, from the last (-1).
        outside: rows that are not in the pool.
    """

    model: Model = "base"
    token_loss: TokenLoss = "ce"
    of: Of = "chosen"
    at: int = 0
    outside: Rows | None = None

    @property
    def word(self) -> str:  # type: ignore[override]
        """What a method that has it needs."""
        if self.token_loss == "error-norm":
            return "error-norms"
        return {"checkpoint": "checkpoint-losses"}.get(self.model, "answers" if self.of == "alone" else "losses")

    @property
    def _label(self) -> str:
        """How it is called inside folder names and titles; of a checkpoint only where that is there."""
        suffix = SUFFIX[self.of]
        if self.outside is not None:
            return f"heldout-{self.model}"
        return f"fold{self.at}" if self.model == "fold" else f"{self.model}{suffix}"

    def _trained(self) -> Reference | WarmupCheckpoint | None:
        if self.model == "base":
            return None
        if self.model == "checkpoint":
            return WarmupCheckpoint(self.at)
        return Reference(self.at if self.model == "fold" else -1)

    def needs(self, job: Job) -> tuple[Stage, ...]:
        trained = self._trained()
        return () if trained is None else (trained,)

    def inputs(self, job: Job) -> Any:
        return self._data(job)

    def _data(self, job: Job) -> dict[str, Any]:
        return job.data_key() if self.outside is None else {**job.data_key(), "pool": self.outside.data}

    def rows(self, job: Job) -> Rows:
        """The rows; of a fold those that its reference was not trained on."""
        if self.outside is not None:
            return self.outside
        rows = job.rows_of(self.of)
        if self.model != "fold":
            return rows
        return rows.part(np.flatnonzero(fold_of(job.ids, job.recipe.reference.folds) == self.at))

    def name(self, job: Job) -> str:
        if self.of == "alone":
            return "losses-alone"
        label = WarmupCheckpoint(self.at).value(job).path.name if self.model == "checkpoint" else self._label
        return f"losses-{label}"

    def key(self, job: Job) -> dict[str, Any]:
        if self.of == "alone":
            return {"version": VERSION, **self._data(job)}
        key = {"version": VERSION, **self._data(job), "token_loss": self.token_loss}
        if self.model == "checkpoint":
            return {**key, "checkpoint": digest(weights_of(WarmupCheckpoint(self.at).value(job).path))}
        if self.model == "base":
            return key
        trained = Reference(self.at if self.model == "fold" else -1).value(job)
        return {**key, "reference": trained.fingerprint, **({"fold": self.at} if self.model == "fold" else {})}

    def together(self, job: Job) -> Any:
        """Base and reference go through in one pass where the reference is an adapter."""
        pair = self.model in ("base", "reference") and self.of != "alone"
        whole = self.model == "reference" and Reference().value(job).full
        return (self.token_loss, self.of, self.outside) if pair and not whole else self

    def works(self, job: Job) -> tuple[Work, ...]:
        rows, loss = self.rows(job), of_loss(self.token_loss)
        stage = "losses under the base" if self.model == "base" else "losses under the reference"
        stage = {"checkpoint": "losses at the checkpoints"}.get(self.model, PRICED.get(self.of, stage))
        if self.token_loss == "error-norm":
            stage = "error norms under the base"
        if self.outside is not None:
            stage = "reference on held-out rows"
        label = WarmupCheckpoint(self.at).name(job) if self.model == "checkpoint" else self._label
        both = f"{label.replace('reference', 'base')} and {label.replace('base', 'reference')}"
        labels = [label, both] if self.model in ("base", "reference") else [label]
        titles = tuple(self._titled(names, loss) for names in labels if label)
        part = f"fold{self.at}" if self.model == "fold" else ""
        work = forward(job, f"{stage}{loss}", rows.tokens, id_=self.id(job), titles=titles, part=part)
        return (work,)

    def _titled(self, names: str, loss: str) -> str:
        if self.of == "alone":
            return "losses (answers alone)"
        return f"{'error norms' if self.token_loss == 'error-norm' else 'losses'} ({names}{loss})"

    @classmethod
    def title(cls, job: Job, stages: Sequence[Losses]) -> str:
        first = stages[0]
        names = " and ".join(stage.name(job).removeprefix("losses-") for stage in stages)
        return first._titled(names, of_loss(first.token_loss))

    @classmethod
    def spent(cls, job: Job, rows: list[Encoded], stages: Sequence[Losses]) -> tuple[int, float]:
        n_tokens, n_head = count_tokens(rows)
        return n_tokens * len(stages), flops(job.loaded.model, n_tokens, n_head, passes=len(stages))

    @classmethod
    @contextmanager
    def opened(cls, job: Job, stages: Sequence[Losses]) -> Iterator[Batch]:
        """The base, with the adapter where there is one; or a fully fine-tuned reference in the base's place."""
        from keepset.features.losses import row_losses

        trained = next((stage for stage in stages if stage.model != "base"), None)
        path, full = (None, False) if trained is None else trained._weights(job)
        budget = job.recipe.batching.token_budget

        def batch_with(model: Any) -> Batch:
            def batch(rows: list[Any], missing: list[Sweep]) -> dict[Sweep, Arrays]:
                if path is None:
                    adapters: tuple[bool, ...] = (False,)
                else:
                    adapters = tuple(isinstance(s, Losses) and s.model != "base" for s in missing)
                losses = row_losses(
                    model, rows, token_budget=budget, adapters=adapters, token_loss=stages[0].token_loss
                )
                return {s: losses.columns(k) for k, s in enumerate(missing)}

            return batch

        if path is None:
            yield batch_with(job.loaded.model)
        elif full:
            with job.instead(job.recipe.model.model_copy(update={"model_name_or_path": str(path)})) as other:
                yield batch_with(other.model)
        else:
            with attached(job.loaded.model, path) as model:
                yield batch_with(model)

    def _weights(self, job: Job) -> tuple[Any, bool]:
        """Where the trained model lies, and whether it is a whole one."""
        if self.model == "checkpoint":
            return WarmupCheckpoint(self.at).value(job).path, False
        trained = Reference(self.at if self.model == "fold" else -1).value(job)
        return trained.path, trained.full


def of_loss(token_loss: str) -> str:
    """How a sweep of another loss than the cross-entropy is told apart in `costs.jsonl`."""
    return "" if token_loss in ("ce", "error-norm") else f", {token_loss}"


def forward(
    job: Job, stage: str, rows: Sequence[Encoded], *, id_: str = "", titles: tuple[str, ...] = (), head: bool = True,
    part: str = "",
) -> Work:  # fmt: skip
    """A forward pass over `rows`, with the output head on supervised positions or without it."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head if head else 0)
    return Work(stage, "forward", len(rows), n_tokens, work, ids=(id_,) if id_ else (), titles=titles, part=part)


@dataclass(frozen=True)
class CrossFitted(Stage):
    """Losses under cross-fitted references: each row's was trained on the other folds."""

    token_loss: TokenLoss = "ce"

    word = "losses"

    def _folds(self, job: Job) -> list[Losses]:
        return [Losses("fold", self.token_loss, at=k) for k in range(job.recipe.reference.folds)]

    def needs(self, job: Job) -> tuple[Stage, ...]:
        return tuple(self._folds(job))

    def inputs(self, job: Job) -> Any:
        return None

    def value(self, job: Job) -> Arrays:
        fold = fold_of(job.ids, job.recipe.reference.folds)
        whole: Arrays = {}
        for stage in self._folds(job):
            for name, values in stage.value(job).items():
                whole.setdefault(name, np.zeros(len(fold), dtype=values.dtype))[fold == stage.at] = values
        return whole


def reference_losses(job: Job, token_loss: TokenLoss = "ce", of: Of = "chosen") -> Stage:
    """The stage of a pool's losses under its reference; with `reference.folds` under the references of its folds.

    Raises:
        RecipeError: the pool has no such sides, or a cross-fitted reference doesn't score them.
    """
    if of == "rejected" and not job.pool.has_pairs:
        raise RecipeError("side: the rejected sides are scored for a pool of pairs only; set `pairs: true` on it")
    if job.recipe.reference.folds < 2:
        return Losses("reference", token_loss, of)
    if of == "rejected":
        raise RecipeError("reference.folds: cross-fitting scores the chosen sides only; use `side: chosen`")
    if of == "content":
        raise RecipeError("reference.folds: cross-fitted losses count the end of turn; drop `end_of_turn: false`")
    return CrossFitted(token_loss)


def held_out_losses(job: Job, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed losses (n,) in nats under base and reference, and supervised tokens (n,), of rows outside the pool."""
    base, reference = Losses("base", outside=rows), Losses("reference", outside=rows)
    arrays = fetch(job, [base, reference])
    return arrays[base]["nll"], arrays[reference]["nll"], arrays[base]["n_tokens"]
