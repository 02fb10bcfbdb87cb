"""What scoring trains: DavIR's reference, a reference for each fold, and the warm-up with its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.data.ids import fold_of
from keepset.lazy import pick
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.model.kind import check_same_tokens
from keepset.model.weights import config_digests, fingerprint, weight_files
from keepset.recipe import TrainSpec
from keepset.row_ids import Ids, id_order
from keepset.runfolder import layout
from keepset.runfolder.files import digest, digest_list, file_digest
from keepset.runfolder.shards import Kept
from keepset.stages.stage import VERSION, Stage, Work
from keepset.train.warmup import list_checkpoints, pick_subset

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job
    from keepset.train.warmup import Checkpoint

    Sides = tuple[Encoded, ...]


@dataclass(frozen=True)
class Trained:
    """A reference model: its folder, what its weights are, and whether it is a full model rather than an adapter."""

    path: Path
    fingerprint: str
    full: bool


def train_key(job: Job, args: TrainSpec, ids: Ids | np.ndarray, seed: int) -> dict[str, Any]:
    """Everything a training run depends on."""
    return {
        "version": VERSION,
        "model": job.fingerprint,
        "encoder": job.encoder.fingerprint,
        "lora": None if args.full else job.recipe.lora.model_dump(),
        "args": args.key(),
        "ids": digest_list(ids[id_order(ids)]),
        "seed": seed,
    }


def weights_of(path: Path) -> list[str]:
    """Checksums of a folder's safetensors files and of what its config says, whichever folder its base lies in."""
    return [*(file_digest(p) for p in sorted(path.glob("*.safetensors"))), *config_digests(path)]


def training(job: Job, stage: str, sides: Sequence[Sides], args: TrainSpec, folder: str = "", id_: str = "") -> Work:
    """A fine-tuning on rows, given as their sides, whose entry in `costs.jsonl` is called `train <folder>`."""
    n_tokens, n_head = count_tokens(trained_sides(sides, args))
    work = flops(job.loaded.model, n_tokens, n_head, passes=3 if args.full else 2) * args.num_train_epochs
    tokens = int(n_tokens * args.num_train_epochs)
    titles = (f"train {folder}",) if folder else ()
    return Work(stage, "train", len(sides), tokens, work, ids=(id_,) if id_ else (), titles=titles)


def train_once(
    job: Job, stage: Stage, folder: str, rows: tuple[Sequence[Sides], Ids | np.ndarray], args: TrainSpec, seed: int,
    fit: Callable[[Sequence[Sides], Path], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Train on some rows into `folder`, unless that was done.

    The rows are put in the order of their ids, so that the order of the pool's files doesn't change the weights. `fit`
    trains on sides into a folder and returns the facts that are kept.
    """
    sides = pick(rows[0], id_order(rows[1]))

    def work(path: Path) -> dict[str, Any]:
        (price,) = stage.works(job)
        n_tokens, _ = count_tokens(trained_sides(sides, args))
        with job.run.timed(f"train {folder}", rows=len(sides), ids=[stage.id(job)]) as spent:
            job.say(f"training {folder}: {len(sides)} rows, {n_tokens} tokens, {args.num_train_epochs:g} epochs")
            job.release()
            facts = fit(sides, path)
            spent.update(tokens=price.tokens, flops=price.flops)
        return facts

    return job.run.step(folder, train_key(job, args, rows[1], seed), work)


@dataclass(frozen=True)
class Reference(Stage):
    """DavIR's reference: the base fine-tuned on the pool, or on all folds but one (`fold` from 0; -1: on all).

    With `reference.fraction` on a share of those rows, drawn by content id.
    """

    fold: int = -1

    word = "reference"

    def _rows(self, job: Job) -> tuple[Sequence[Sides], Ids | np.ndarray]:
        spec = job.recipe.reference
        if self.fold < 0 and spec.fraction == 1:
            return job.sides[1], job.ids
        train = np.arange(len(job.ids))
        if self.fold >= 0:
            train = np.flatnonzero(fold_of(job.ids, spec.folds) != self.fold)
        if spec.fraction < 1:
            train = train[pick_subset(job.ids[train], spec.fraction, job.recipe.seed)]
        return pick(job.sides[1], train), job.ids[train]

    @property
    def folder(self) -> str:
        """Where it goes in the run folder."""
        return layout.reference(None if self.fold < 0 else self.fold)

    def inputs(self, job: Job) -> Any:
        """What it is trained from, or its weights where it is from elsewhere."""
        spec = job.recipe.reference
        if spec.path:
            return self.value(job).fingerprint
        return train_key(job, spec, self._rows(job)[1], job.recipe.seed)

    def kept(self, job: Job) -> Kept | None:
        """Its folder; nowhere where the reference is from elsewhere."""
        spec = job.recipe.reference
        if spec.path:
            return None
        return Kept(self.folder, train_key(job, spec, self._rows(job)[1], job.recipe.seed), step=True)

    def works(self, job: Job) -> tuple[Work, ...]:
        """The training; none where the reference is from elsewhere."""
        spec = job.recipe.reference
        if spec.path:
            return ()
        stage = "train the reference" if self.fold < 0 else f"train reference {self.fold + 1} of {spec.folds}"
        work = training(job, stage, self._rows(job)[0], spec, self.folder, self.id(job))
        return (replace(work, need="reference"),)

    def value(self, job: Job) -> Trained:
        """The reference, trained once and then reused.

        Raises:
            ModelError: an existing one reads other tokens than the scored model.
        """
        spec = job.recipe.reference
        if spec.path:
            return job.once_a_recipe(self, lambda: given_reference(job))

        def fit_reference(sides: Sequence[Sides], path: Path) -> dict[str, Any]:
            from keepset.train.fit import fit

            n_tokens, _ = count_tokens(trained_sides(sides, spec))
            result = fit(
                job.recipe.model, job.recipe.lora, sides, path, spec, seed=job.recipe.seed, console=job.console
            )
            return {"seconds": result.seconds, "steps": result.steps, "rows": len(sides), "tokens": n_tokens,
                    "losses": result.losses}  # fmt: skip

        def made() -> Trained:
            train_once(job, self, self.folder, self._rows(job), spec, job.recipe.seed, fit_reference)
            path = job.run.path / self.folder
            return Trained(path, digest(weights_of(path)), spec.full)

        return job.once_a_recipe(self, made)


def given_reference(job: Job) -> Trained:
    """The reference of `reference.path`."""
    from keepset.model.load import adapter_tokenizer, load_tokenizer, resolve

    spec = job.recipe.reference
    path = Path(str(spec.path))
    full = not (path / "adapter_config.json").exists() or bool(weight_files(path))
    model = job.recipe.model.model_copy(update={"model_name_or_path": str(path)})
    other = load_tokenizer(model) if full else adapter_tokenizer(path)
    check_same_tokens(job.encoder.tokenizer, other, str(spec.path))
    if full:
        made = [fingerprint(resolve(model), model.model_revision, code=model.trust_remote_code)]
    else:
        made = weights_of(path)
    return Trained(path, digest([spec.path, *made]), full)


# -- warm-up --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warmup(Stage):
    """A LoRA trained on a share of the pool, with a checkpoint an epoch."""

    word = "warmup"

    def _rows(self, job: Job) -> tuple[np.ndarray, int]:
        """Indices of the rows that it is trained on, and its seed."""
        spec = job.recipe.warmup
        seed = job.recipe.seed if spec.seed is None else spec.seed
        return pick_subset(job.ids, spec.fraction, seed, min_rows=spec.min_rows), seed

    def inputs(self, job: Job) -> Any:
        picked, seed = self._rows(job)
        return train_key(job, job.recipe.warmup, job.ids[picked], seed)

    def kept(self, job: Job) -> Kept:
        """Its folder."""
        return Kept(layout.WARMUP, self.inputs(job), step=True)

    def works(self, job: Job) -> tuple[Work, ...]:
        sides = pick(job.sides[1], self._rows(job)[0])
        return (training(job, "warm-up", sides, job.recipe.warmup, layout.WARMUP, self.id(job)),)

    def value(self, job: Job) -> list[Checkpoint]:
        """Its checkpoints in order of time, trained once and then reused."""
        spec = job.recipe.warmup
        picked, seed = self._rows(job)

        def warm_up(sides: Sequence[Sides], path: Path) -> dict[str, Any]:
            from keepset.train.warmup import warmup

            made = warmup(job.recipe.model, job.recipe.lora, sides, path, spec, seed=seed, console=job.console)
            return {"rows": len(sides), "checkpoints": [c.path.name for c in made]}

        def made() -> list[Checkpoint]:
            rows = pick(job.sides[1], picked), job.ids[picked]
            train_once(job, self, layout.WARMUP, rows, spec, seed, warm_up)
            return list_checkpoints(job.run.path / layout.WARMUP)

        return job.once_a_recipe(self, made)


@dataclass(frozen=True)
class WarmupCheckpoint(Stage):
    """One of the warm-up's checkpoints, counted from its end: -1 is the last."""

    at: int = -1

    word = "warmup"

    def needs(self, job: Job) -> tuple[Stage, ...]:
        return () if job.recipe.warmup.path else (Warmup(),)

    def inputs(self, job: Job) -> Any:
        """Nothing but the training it is of; its rate and weights where it is from elsewhere."""
        if not job.recipe.warmup.path:
            return None
        checkpoint = self.value(job)
        return [checkpoint.mean_lr, weights_of(checkpoint.path)]

    def value(self, job: Job) -> Checkpoint:
        """The checkpoint.

        Raises:
            ModelError: one from elsewhere that reads other tokens than the scored model.
        """
        from keepset.model.load import adapter_tokenizer

        path = job.recipe.warmup.path
        if not path:
            return Warmup().value(job)[self.at]
        checkpoint = list_checkpoints(Path(path))[self.at]
        check_same_tokens(job.encoder.tokenizer, adapter_tokenizer(checkpoint.path), str(checkpoint.path))
        return checkpoint

    def name(self, job: Job) -> str:
        """Its folder's name, `checkpoint-<steps>`; empty where it isn't trained yet."""
        path = job.recipe.warmup.path
        folder = Path(path) if path else job.run.path / layout.WARMUP
        if not path and job.run.done(layout.WARMUP) is None:
            return ""
        return list_checkpoints(folder)[self.at].path.name


def checkpoints(job: Job) -> list[WarmupCheckpoint]:
    """The checkpoints that scores use, in order of time."""
    spec = job.recipe.warmup
    if spec.checkpoints == "last":
        count = 1
    else:
        count = len(list_checkpoints(Path(spec.path))) if spec.path else int(np.ceil(spec.num_train_epochs))
    return [WarmupCheckpoint(k - count) for k in range(count)]
