"""Dots of the rows' gradients with the target's, at one checkpoint of the warm-up: what ROSE, LESS and others sum up.

Stages with one map go through the pool together. The target's gradients, and what an influence function's inverse
curvature makes of them, are stages of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keepset.errors import RecipeError
from keepset.lazy import column, flat, pick, take
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops
from keepset.runfolder.files import digest
from keepset.runfolder.shards import Arrays, Kept
from keepset.stages.rows import Rows
from keepset.stages.stage import VERSION, Batch, Stage, Sweep, Work
from keepset.stages.stored import gradient_passes, sample_of, stored_influence, target_passes
from keepset.stages.trained import WarmupCheckpoint, weights_of
from keepset.train.warmup import pick_subset

if TYPE_CHECKING:
    from keepset.features.targets import GradientTarget
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job


MOST_NUMBERS = 1 << 30  # of target gradients held at once: 4 GiB


@dataclass(frozen=True)
class Curvature:
    """The inverse that an influence function puts before the target's gradient, at the last checkpoint alone."""

    solver: str  # fisher | cg | datainf | ekfac | ekfac-matrix
    labels: Literal["sampled", "data"]
    damping: float
    rows: int
    seed: int


@dataclass(frozen=True)
class InfluenceRequest:
    """How a target's gradients are defined, and (`map`) what is done to the rows' before they are multiplied."""

    loss: str = "sft"  # sft | dpo | margin | mean_margin
    map: str = "sgd"  # sgd | adam | adam-less | precondition | sign
    reference: str = "none"  # base | checkpoint | none
    beta: float = 0.1
    normalise: str = "task"  # pair | task
    curvature: Curvature | None = None
    per: str = "task"  # task | query: a gradient for each row of the target

    def key(self) -> dict[str, Any]:
        """Its fields, `curvature` only where there is one, `per` only where it is not the task."""
        return {k: v for k, v in asdict(self).items() if v is not None and (k, v) != ("per", "task")}


def gradient_key(job: Job) -> dict[str, Any]:
    """The recipe's `gradients` where they change the numbers, for the keys of gradient stages."""
    spec = job.recipe.gradients.model_dump(include={"last_layers", "max_completion_tokens"}, exclude_none=True)
    loss = job.recipe.train.loss, job.recipe.train.beta
    return {**({"gradients": spec} if spec else {}), **({"row_loss": loss} if job.pair_gradients else {})}


def store_inputs(job: Job) -> Any:
    """What a gradient store's estimates depend on; None without one."""
    spec = job.recipe.gradients
    if spec.store is None:
        return None
    from keepset.features.projection import dimension_for

    return [spec.store_dim or dimension_for(spec.store_error), spec.store_dtype, spec.store_sample]


@dataclass(frozen=True)
class TargetGradients(Stage):
    """A gradient for each task (or row) of the target at one checkpoint, never mapped; after its inverse curvature."""

    request: InfluenceRequest
    at: int = -1
    shots: int | None = None

    @property
    def word(self) -> str:  # type: ignore[override]
        """What a method that has it needs."""
        return "gradients" if self.request.curvature is None else "curvature"

    def needs(self, job: Job) -> tuple[Stage, ...]:
        """The checkpoint, and the gradients that are multiplied by the inverse curvature."""
        return (WarmupCheckpoint(self.at), *([] if self.request.curvature is None else [self._plain()]))

    def _plain(self) -> TargetGradients:
        return replace(self, request=replace(self.request, curvature=None))

    def inputs(self, job: Job) -> Any:
        """The base, the template, the target and its tasks; the rows that make up a curvature."""
        aim = job.aim(self.shots)
        data = job.data_key() if self.request.curvature else {k: v for k, v in job.data_key().items() if k != "pool"}
        return {**data, "target": aim.target.fingerprint(), "tasks": aim.names, **gradient_key(job)}

    def _key(self, job: Job) -> dict[str, Any]:
        request = {k: v for k, v in self.request.key().items() if k != "map"}
        weights = digest(weights_of(WarmupCheckpoint(self.at).value(job).path))
        return {"version": VERSION, **self.inputs(job), "checkpoint": weights, "request": request}

    def works(self, job: Job) -> tuple[Work, ...]:
        request, aim, ids = self.request, job.aim(self.shots), (self.id(job),)
        checkpoint = WarmupCheckpoint(self.at).name(job)
        if request.curvature is not None:
            how = f"({request.curvature.solver}{aim.title})"
            rows, (tokens, work) = curvature_rows(job, request.curvature), curvature_cost(job, request.curvature)
            titles = (f"curvature at {checkpoint} {how}",) if checkpoint else ()
            return (Work(f"curvature {how}", "backward", len(rows), tokens, work, ids, titles),)
        how = f"{request.loss}, a {request.normalise}{', a row' if request.per == 'query' else ''}{aim.title}"
        if (request.loss, request.normalise) == ("dpo", "task"):
            how += f", beta {request.beta:g}, reference {request.reference}"
        sides, (tokens, work) = self._sides(job), self._cost(job)
        titles = (f"target gradients at {checkpoint} ({request.loss}{aim.title})",) if checkpoint else ()
        stage = f"target gradients ({how})"
        return (Work(stage, "backward", len(sides), tokens, work, ids, titles, counted=True),)

    def _sides(self, job: Job) -> list[Encoded]:
        """The target's sides that it looks at."""
        pairs = job.aim(self.shots).pairs
        return [s for pair in pairs for s in (pair[:1] if self.request.loss == "sft" else pair) if s is not None]

    def _cost(self, job: Job) -> tuple[int, float]:
        """Tokens and operations, a pass under the reference included."""
        n_tokens, n_head = count_tokens(self._sides(job))
        again = (self.request.loss, self.request.normalise, self.request.reference) == ("dpo", "task", "base")
        return n_tokens * (1 + again), flops(job.loaded.model, n_tokens, n_head, passes=target_passes(job) + again)

    def value(self, job: Job) -> Arrays:
        """`GradientTarget.arrays`."""
        make, kept = self._solve if self.request.curvature else self._differentiate, self.kept(job)
        return job.run.once(kept.name, kept.key, lambda: make(job).arrays())

    def kept(self, job: Job) -> Kept:
        """As arrays."""
        return Kept(f"target-{WarmupCheckpoint(self.at).value(job).path.name}", self._key(job))

    def _differentiate(self, job: Job) -> GradientTarget:
        from keepset.features.targets import target_vectors

        request, aim, checkpoint = self.request, job.aim(self.shots), WarmupCheckpoint(self.at).value(job)
        job.say(f"target gradients at {checkpoint.path.name}: {request.loss}, {len(aim.pairs)} rows")
        (work,) = self.works(job)
        codes, count = aim.pair_codes, len(aim.names)
        if request.per == "query":
            codes, count = np.arange(len(aim.pairs)), len(aim.pairs)
        with (
            attached(job.loaded.model, checkpoint.path) as model,
            job.run.timed(work.titles[0], rows=work.rows, ids=list(work.ids), tokens=work.tokens, flops=work.flops),
        ):
            refuse_too_many(model, count)
            return target_vectors(
                model, aim.pairs, codes, n_tasks=count, loss=request.loss, beta=request.beta,
                reference=request.reference, normalise=request.normalise,
                token_budget=job.recipe.batching.token_budget, last_layers=job.recipe.gradients.last_layers,
            )  # fmt: skip

    def _solve(self, job: Job) -> GradientTarget:
        from keepset.features.curvature import solve_target

        curvature, checkpoint = self.request.curvature, WarmupCheckpoint(self.at).value(job)
        assert curvature is not None
        target, rows = self._plain().value(job), curvature_rows(job, curvature)
        job.say(f"curvature at {checkpoint.path.name}: {curvature.solver}, {len(rows)} rows")
        (work,) = self.works(job)
        with (
            attached(job.loaded.model, checkpoint.path) as model,
            job.run.timed(work.titles[0], rows=len(rows), ids=list(work.ids)) as spent,
        ):
            if curvature.solver != "cg":  # which stops by itself
                spent.update(tokens=work.tokens, flops=work.flops)
            return solve_target(
                model, on_device(target, model), rows, solver=curvature.solver, labels=curvature.labels,
                damping=curvature.damping, token_budget=job.recipe.batching.token_budget, seed=curvature.seed,
                last_layers=job.recipe.gradients.last_layers,
            )  # fmt: skip


def refuse_too_many(model: Any, count: int) -> None:
    """Refuse target gradients that don't fit into memory.

    Raises:
        RecipeError: so many gradients of the adapter take more than `MOST_NUMBERS`.
    """
    numbers = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if count * numbers > MOST_NUMBERS:
        raise RecipeError(
            f"{count} gradients of {numbers:,} numbers each take {count * numbers / 2**28:.0f} GiB: set `per: task`, "
            "fewer `shots`, a smaller lora.lora_r, or gradients.last_layers"
        )


def on_device(arrays: Arrays, model: Any) -> GradientTarget:
    """Stored target gradients where the model is."""
    from keepset.features.targets import GradientTarget

    return GradientTarget.from_arrays(arrays, model.device)


def curvature_rows(job: Job, curvature: Curvature) -> list[Encoded]:
    """The rows that make up the curvature: drawn by content id.

    Raises:
        RecipeError: gradients are of pairs.
    """
    if job.pair_gradients:
        raise RecipeError("influence functions are formed of single rows, not of pairs; use rose, less or grad-cosine")
    rows = job.rows_of("gradients").tokens
    return [row[0] for row in take(rows, pick_subset(job.ids, 0.0, curvature.seed, min_rows=curvature.rows))]


def curvature_cost(job: Job, curvature: Curvature) -> tuple[int, float]:
    """Tokens and operations of a solve; of conjugate gradients, which stop by themselves, 30 products are assumed."""
    times = {"fisher": 1, "cg": 1 + 2 * 30}.get(curvature.solver, 2)
    n_tokens, n_head = count_tokens(curvature_rows(job, curvature))
    return n_tokens * times, flops(job.loaded.model, n_tokens, n_head, passes=target_passes(job) * times)


@dataclass(frozen=True)
class Dots(Sweep):
    """Dots (n, j) of the rows' mapped gradients with the target's, their `norms` (n,) and `momentum` shares (n,)."""

    request: InfluenceRequest
    at: int = -1
    shots: int | None = None

    word = "gradients"

    @property
    def target(self) -> TargetGradients:
        """The gradients of the target, which no map changes."""
        return TargetGradients(replace(self.request, map="sgd"), self.at, self.shots)

    def needs(self, job: Job) -> tuple[Stage, ...]:
        return WarmupCheckpoint(self.at), self.target

    def inputs(self, job: Job) -> Any:
        return [job.data_key(), gradient_key(job), store_inputs(job)]

    def rows(self, job: Job) -> Rows:
        return job.rows_of("gradients")

    def name(self, job: Job) -> str:
        """`influence-<hash of the request>-checkpoint-<steps>`."""
        checkpoint = WarmupCheckpoint(self.at).value(job)
        return f"influence-{digest(self.request.key())[:8]}-{checkpoint.path.name}"

    def key(self, job: Job) -> dict[str, Any]:
        aim, checkpoint = job.aim(self.shots), WarmupCheckpoint(self.at).value(job)
        return {
            "version": VERSION, **job.data_key(), "checkpoint": digest(weights_of(checkpoint.path)),
            "target": aim.target.fingerprint(), "tasks": aim.names, "request": self.request.key(),
            **gradient_key(job),
        }  # fmt: skip

    def together(self, job: Job) -> Any:
        """One map, checkpoint and target: one pass. A store's rows are read for each target by itself."""
        return self if job.recipe.gradients.store else (self.request.map, self.at, self.shots)

    def works(self, job: Job) -> tuple[Work, ...]:
        """The pass over the pool, whoever else takes part; with a store also the sample that it is held against."""
        store, aim = job.recipe.gradients.store, job.aim(self.shots)
        checkpoint, map_ = WarmupCheckpoint(self.at).name(job), self.request.map
        sides = flat(self.rows(job).tokens)
        own = "" if store else aim.title  # rows that are in a store are there for every target
        aims = {m.shots for m in job.recipe.methods} if store else {self.shots}
        aims = aims if checkpoint else set()
        titles = tuple(f"gradients at {checkpoint} ({map_}{job.aim(shots).title})" for shots in aims)
        ids = ([digest(["pass", map_, own, WarmupCheckpoint(self.at).id(job), self.inputs(job)])[:16]], [self.id(job)])
        works = [backward(job, f"gradients ({map_}{own})", sides, ids=ids[0], titles=titles, need="gradients")]
        if store:
            rows = self.rows(job).tokens
            sample = pick(column(rows, 0), sample_of(len(rows), job.recipe.gradients.store_sample))
            stage = f"sample of the store ({self.request.loss}, {map_}{aim.title})"
            title = f"sample of gradients at {checkpoint} ({map_}{aim.title})"
            works.append(backward(job, stage, sample, ids=ids[1], titles=(title,) if checkpoint else ()))
        return tuple(works)

    @classmethod
    def title(cls, job: Job, stages: Sequence[Dots]) -> str:
        first = stages[0]
        checkpoint = WarmupCheckpoint(first.at).value(job)
        return f"gradients at {checkpoint.path.name} ({first.request.map}{job.aim(first.shots).title})"

    @classmethod
    def spent(cls, job: Job, rows: list[tuple[Encoded, ...]], stages: Sequence[Dots]) -> tuple[int, float]:
        n_tokens, n_head = count_tokens([side for row in rows for side in row])
        return n_tokens, flops(job.loaded.model, n_tokens, n_head, passes=gradient_passes(job))

    @classmethod
    def compute(cls, job: Job, stages: Sequence[Dots]) -> dict[Sweep, Arrays]:
        """From shards, or estimated from a store.

        Raises:
            RecipeError: a store, and gradients are of pairs.
        """
        if not job.recipe.gradients.store:
            return super().compute(job, stages)
        if job.pair_gradients:
            raise RecipeError("gradients.store: holds gradients of single rows, not of pairs; leave it out")
        return {stage: job.once_a_recipe((stage, "stored"), partial(stage._stored, job)) for stage in stages}

    def _stored(self, job: Job) -> Arrays:
        checkpoint, target = WarmupCheckpoint(self.at).value(job), self.target.value(job)
        works = self.works(job)
        rows = column(self.rows(job).tokens, 0)
        with attached(job.loaded.model, checkpoint.path) as model:
            return stored_influence(
                job, model, self.title(job, [self]), rows, on_device(target, model), checkpoint.path,
                self.request.map, (list(works[0].ids), list(works[1].ids)),
            )  # fmt: skip

    @classmethod
    @contextmanager
    def opened(cls, job: Job, stages: Sequence[Dots]) -> Iterator[Batch]:
        from keepset.features.adam import load_adam
        from keepset.features.influence import influence, pair_influence
        from keepset.features.targets import concatenate
        from keepset.model.pair_losses import pair_beta

        checkpoint, kind = WarmupCheckpoint(stages[0].at).value(job), stages[0].request.map
        arrays = {stage: stage.target.value(job) for stage in stages}
        adam, trained, pairs = load_adam(checkpoint.path), job.recipe.train, job.pair_gradients
        budget, last_layers = job.recipe.batching.token_budget, job.recipe.gradients.last_layers
        with attached(job.loaded.model, checkpoint.path) as model:
            targets = {stage: on_device(target, model) for stage, target in arrays.items()}

            def batch(rows: list[Any], missing: list[Any]) -> dict[Sweep, Arrays]:
                stacked = concatenate([targets[stage] for stage in missing])
                if pairs:
                    rowwise = pair_influence(
                        model, rows, stacked, loss=trained.loss, beta=pair_beta(trained.loss, trained.beta), adam=adam,
                        map=kind, token_budget=budget, last_layers=last_layers,
                    )  # fmt: skip
                else:
                    rowwise = influence(
                        model, [row for (row,) in rows], stacked, adam=adam, map=kind, token_budget=budget,
                        last_layers=last_layers,
                    )  # fmt: skip
                dots, ends, columns = rowwise.dots, 0, {}
                for stage in missing:
                    start, ends = ends, ends + targets[stage].n_targets
                    columns[stage] = {
                        "dots": dots[:, start:ends], "norms": rowwise.norms, "momentum": rowwise.momentum
                    }  # fmt: skip
                return columns

            yield batch


def backward(
    job: Job, stage: str, rows: Sequence[Encoded], *, ids: list[str], titles: tuple[str, ...], need: str = ""
) -> Work:
    """A pass forward and backward through frozen weights over `rows`."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head, passes=gradient_passes(job))
    return Work(stage, "backward", len(rows), n_tokens, work, tuple(ids), titles, counted=True, need=need)
