"""The gradient stage: dots of the rows' gradients with targets, in one pass over the pool for a map and checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import RecipeError
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops
from keepset.runfolder.files import digest
from keepset.runfolder.shards import Arrays
from keepset.stages.counts import gradient_passes, gradient_rows, pair_gradients, target_passes
from keepset.stages.losses import VERSION, sweep_rows, warmup_checkpoints, weights_of
from keepset.stages.stored import stored_influence

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job
    from keepset.train.fit import Sides
    from keepset.train.warmup import Checkpoint


@dataclass(frozen=True)
class Curvature:
    """The inverse that an influence function puts before the target's gradient, at the last checkpoint alone."""

    solver: str  # fisher | datainf | ekfac | ekfac-matrix
    labels: str  # sampled | data
    damping: float
    rows: int
    seed: int


@dataclass(frozen=True)
class InfluenceRequest:
    """One target-gradient definition; requests with one map share the pass over the pool."""

    loss: str  # sft | dpo | margin | mean_margin
    map: str  # sgd | adam | adam-less | precondition | sign
    reference: str  # base | checkpoint | none
    beta: float
    normalise: str  # pair | task
    curvature: Curvature | None = None

    def key(self) -> dict[str, Any]:
        """What it is, without what it doesn't have."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def curvature_rows(job: Job, wanted: Curvature) -> list[Encoded]:
    """The rows that make up the curvature: drawn by content id."""
    from keepset.train.warmup import pick_subset

    if pair_gradients(job):
        raise RecipeError("influence functions are formed of single rows, not of pairs; use rose, less or grad-cosine")
    rows = [row for (row,) in gradient_rows(job)]
    return [rows[i] for i in pick_subset(job.ids, 0.0, wanted.seed, min_rows=wanted.rows)]


def curvature_cost(job: Job, wanted: Curvature) -> tuple[int, float]:
    """Tokens and operations of a solve; of conjugate gradients, which stop by themselves, 30 products are assumed."""
    times = {"fisher": 1, "cg": 1 + 2 * 30}.get(wanted.solver, 2)
    n_tokens, n_head = count_tokens(curvature_rows(job, wanted))
    return n_tokens * times, flops(job.loaded.model, n_tokens, n_head, passes=target_passes(job) * times)


def target_rows(job: Job, request: InfluenceRequest) -> list[Encoded]:
    """The target's sides that a request looks at."""
    pairs = job.target_pairs[0]
    return [side for pair in pairs for side in (pair[:1] if request.loss == "sft" else pair) if side is not None]


def target_cost(job: Job, request: InfluenceRequest) -> tuple[int, float]:
    """Tokens and operations of a target's gradients at one checkpoint, a pass under the reference included."""
    n_tokens, n_head = count_tokens(target_rows(job, request))
    again = (request.loss, request.normalise, request.reference) == ("dpo", "task", "base")
    work = flops(job.loaded.model, n_tokens, n_head, passes=target_passes(job) + again)
    return n_tokens * (1 + again), work


def influence(job: Job, wanted: InfluenceRequest, others: list[InfluenceRequest]) -> dict[str, np.ndarray]:
    """Dots (c, n, j), norms (c, n), momentum share (c, n) and mean learning rates (c,) for `wanted`.

    Requests in `others` with the same map are computed in the same pass over the pool and stay on disk for their turn.
    """
    checkpoints = warmup_checkpoints(job)
    requests = list(dict.fromkeys([*(r for r in others if r.map == wanted.map), wanted]))  # in the recipe's order
    if job.recipe.gradients.store:  # its rows are read for each target by itself
        requests = [wanted]
    last = checkpoints[-1]
    checkpoints = [last] if wanted.curvature else checkpoints
    found = [
        checkpoint_influence(job, c, [r for r in requests if c is last or r.curvature is None])[wanted]
        for c in checkpoints
    ]
    return {
        **{name: np.stack([f[name] for f in found]) for name in found[0]},
        "lr": np.array([c.mean_lr for c in checkpoints]),
    }


def gradient_key(job: Job) -> dict[str, Any]:
    """The recipe's `gradients` where they change the numbers, for the keys of gradient stages."""
    spec = job.recipe.gradients.model_dump(include={"last_layers", "max_completion_tokens"}, exclude_none=True)
    loss = job.recipe.train.loss, job.recipe.train.beta
    return {**({"gradients": spec} if spec else {}), **({"row_loss": loss} if pair_gradients(job) else {})}


def checkpoint_influence(
    job: Job, checkpoint: Checkpoint, requests: list[InfluenceRequest]
) -> dict[InfluenceRequest, Arrays]:
    """All requests (of one map) at one checkpoint, in one pass over the pool."""
    from keepset.features.adam import load_adam
    from keepset.features.curvature import solve_target
    from keepset.features.influence import influence as row_influence
    from keepset.features.influence import pair_influence
    from keepset.features.targets import GradientTarget, concatenate, target_vectors
    from keepset.model.pair_losses import pair_beta

    names, codes = job.task_codes()
    pairs, kept = job.target_pairs

    def stage_key(request: InfluenceRequest) -> dict[str, Any]:
        return {
            "version": VERSION, **job.data_key(), "checkpoint": digest(weights_of(checkpoint.path)),
            "target": job.target.fingerprint(), "tasks": names, "request": request.key(), **gradient_key(job),
        }  # fmt: skip

    stages = {f"influence-{digest(r.key())[:8]}-{checkpoint.path.name}": stage_key(r) for r in requests}
    by_name = dict(zip(stages, requests, strict=True))
    vectors: dict[InfluenceRequest, GradientTarget] = {}
    budget, last_layers = job.recipe.batching.token_budget, job.recipe.gradients.last_layers
    rows, kind, trained = gradient_rows(job), requests[0].map, job.recipe.train

    def target_of(request: InfluenceRequest) -> GradientTarget:
        if request not in vectors:
            wanted = {k: v for k, v in request.key().items() if k != "map"}  # targets are never mapped
            drop = () if request.curvature else ("pool",)
            key = {k: v for k, v in stage_key(request).items() if k not in drop} | {"request": wanted}
            form = solved if request.curvature else plain
            found = job.run.once(f"target-{checkpoint.path.name}", key, lambda: form(request).arrays())
            vectors[request] = GradientTarget.from_arrays(found, model.device)
        return vectors[request]

    def plain(request: InfluenceRequest) -> GradientTarget:
        job.say(f"target gradients at {checkpoint.path.name}: {request.loss}, {len(pairs)} rows")
        what = f"target gradients at {checkpoint.path.name} ({request.loss}{job.aim})"
        with job.run.timed(what, rows=len(target_rows(job, request))) as spent:
            spent["tokens"], spent["flops"] = target_cost(job, request)
            return target_vectors(
                model, pairs, codes[kept], n_tasks=len(names), loss=request.loss, beta=request.beta,
                reference=request.reference, normalise=request.normalise, token_budget=budget, last_layers=last_layers,
            )  # fmt: skip

    def solved(request: InfluenceRequest) -> GradientTarget:
        curved = request.curvature
        assert curved is not None
        target, some = target_of(replace(request, curvature=None)), curvature_rows(job, curved)
        job.say(f"curvature at {checkpoint.path.name}: {curved.solver}, {len(some)} rows")
        with job.run.timed(f"curvature at {checkpoint.path.name} ({curved.solver}{job.aim})", rows=len(some)) as spent:
            if curved.solver != "cg":  # which stops by itself
                spent["tokens"], spent["flops"] = curvature_cost(job, curved)
            return solve_target(
                model, target, some, solver=curved.solver, labels=curved.labels,  # type: ignore[arg-type]
                damping=curved.damping, token_budget=budget, seed=curved.seed, last_layers=last_layers,
            )  # fmt: skip

    def batch(some: list[Sides], missing: list[str]) -> dict[str, Arrays]:
        stacked = concatenate([target_of(by_name[name]) for name in missing])
        if pair_gradients(job):
            found = pair_influence(
                model, some, stacked, loss=trained.loss, beta=pair_beta(trained.loss, trained.beta), adam=adam,
                map=kind, token_budget=budget, last_layers=last_layers,
            )  # fmt: skip
        else:
            found = row_influence(
                model, [row for (row,) in some], stacked, adam=adam, map=kind, token_budget=budget,
                last_layers=last_layers,
            )  # fmt: skip
        parts = np.split(found.dots, len(missing), axis=1)
        return {
            name: {"dots": part, "norms": found.norms, "momentum": found.momentum}
            for name, part in zip(missing, parts, strict=True)
        }

    adam = load_adam(checkpoint.path)
    with attached(job.loaded.model, checkpoint.path) as model:
        what = f"gradients at {checkpoint.path.name} ({kind}{job.aim})"
        if job.recipe.gradients.store and pair_gradients(job):
            raise RecipeError("gradients.store: holds gradients of single rows, not of pairs; leave it out")
        if job.recipe.gradients.store:
            adapter = digest(weights_of(checkpoint.path))
            return {
                request: stored_influence(
                    job, model, what, [row for (row,) in rows], target_of(request), adam, kind, adapter
                )
                for request in requests
            }
        shard_rows = job.recipe.batching.shard_rows
        for name, key in stages.items():  # before the sweep, so that their time isn't counted in it as well
            if not job.run.complete(name, key, job.ids, shard_rows):
                target_of(by_name[name])
        out = sweep_rows(job, stages, what, batch, rows=rows, passes=gradient_passes(job))
    return {by_name[name]: arrays for name, arrays in out.items()}
