"""Gradient scores from a reusable store: the pool's rows are sketched once, every later target only reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.lazy import take
from keepset.model.flops import count_tokens, flops
from keepset.runfolder.files import digest
from keepset.runfolder.shards import Arrays, plan_shards

if TYPE_CHECKING:
    from keepset.features.adam import AdamState
    from keepset.features.targets import GradientTarget
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job


def sample_of(n: int, size: int) -> np.ndarray:
    """Indices of the rows that are scored exactly too, spread over all n."""
    return np.unique(np.linspace(0, n - 1, size).round().astype(int))


def stored_influence(
    job: Job,
    model: Any,
    what: str,
    rows: Sequence[Encoded],
    target: GradientTarget,
    adam: AdamState,
    kind: str,
    adapter: str,
    ids: tuple[list[str], list[str]],
    passes: float,
) -> Arrays:
    """Dots, norms and momentum shares of all rows, estimated from the store of one checkpoint and map.

    Args:
        job: its recipe's `gradients` names the store; rows that it lacks are added, in the pool's order.
        model: the base with the checkpoint's adapter.
        what: the stage's name in `costs.jsonl` and on screen.
        rows: the job's rows as they are scored.
        target: of `target_vectors` at this checkpoint.
        adam: the checkpoint's moments.
        kind: the gradient map.
        adapter: the checkpoint's digest.
        ids: what the entries of the pass and of the sample in `costs.jsonl` are found by.
        passes: forward-equivalents of a gradient pass.

    Returns:
        The columns of `Dots`, and the store's error on a sample that is scored exactly too:
        `store_rms` (of a cosine) and `store_spearman` (median over tasks); NaN without a sample.

    Raises:
        PlanMismatch: the store was made with another model, checkpoint, template, map, size or other first rows.
    """
    from keepset.features.gradient_store import GradientStore, build_store
    from keepset.features.influence import influence
    from keepset.features.projection import dimension_for, project_target, store_error, target_lengths

    spec, budget = job.recipe.gradients, job.recipe.batching.token_budget
    last_layers = spec.last_layers
    depends = {
        "model": job.fingerprint,
        "encoder": job.encoder.fingerprint,
        "adapter": adapter,
        "last_layers": str(last_layers),
        "max_completion_tokens": str(spec.max_completion_tokens),
    }
    store = GradientStore.create(
        Path(str(spec.store)) / f"{digest(depends)[:12]}-{kind}",
        depends,
        dim=spec.store_dim or dimension_for(spec.store_error),
        dtype=spec.store_dtype,
        map=kind,
    )
    row_ids, before = [str(i) for i in job.ids], store.n_rows
    job.say(f"store {store.path}: {before} rows kept, {max(0, len(rows) - before)} to add")
    with job.run.timed(what, rows=len(rows) - before, ids=ids[0]) as spent, job.tracked(what, len(rows)) as advance:
        advance(before)
        done = before

        def progress(now: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        build_store(
            store,
            model,
            rows,
            row_ids,
            adam=adam,
            token_budget=budget,
            chunk=len(plan_shards(job.ids, job.recipe.batching.shard_rows)[0]),
            progress=progress,
            last_layers=last_layers,
        )
        n_tokens, n_head = count_tokens(rows[before:])
        spent.update(tokens=n_tokens, flops=flops(model, n_tokens, n_head, passes=passes))
        spent["skip"] = before >= len(rows)
    projected = project_target(store.sketch, target, map=kind, adam=adam)
    dots, norms = store.dots(projected), store.norms
    rms = spearman = float("nan")
    if spec.store_sample:
        at = sample_of(len(rows), spec.store_sample)
        some = take(rows, at)
        with job.run.timed(f"sample of {what}", rows=len(at), ids=ids[1]) as spent:
            n_tokens, n_head = count_tokens(some)
            spent.update(tokens=n_tokens, flops=flops(model, n_tokens, n_head, passes=passes))
            exact = influence(model, some, target, adam=adam, map=kind, token_budget=budget, last_layers=last_layers)
        error = store_error(dots[at], exact.dots, exact.norms, target_lengths(target))
        rms, spearman = error.rms, float(np.median(error.spearman))
    return {
        "dots": dots,
        "norms": norms,
        "momentum": store.momentum,
        "store_rms": np.array(rms),
        "store_spearman": np.array(spearman),
    }
