"""Gradient scores from a reusable store: the pool's rows are sketched once, every later target only reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.lazy import pick, take
from keepset.model.flops import count_tokens, flops
from keepset.runfolder.files import digest
from keepset.runfolder.shards import Arrays, plan_shards
from keepset.stages.trained import weights_of

if TYPE_CHECKING:
    from keepset.features.adam import AdamState
    from keepset.features.gradient_store import GradientStore
    from keepset.features.targets import GradientTarget
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job


def target_passes(job: Job) -> float:
    """Forward-equivalents of plain gradients: the backward part ends below the lowest layer that is looked at."""
    depth, layers = job.recipe.gradients.last_layers, job.loaded.model.config.get_text_config().num_hidden_layers
    return 2.0 if depth is None else 1.0 + min(1.0, depth / layers)


def gradient_passes(job: Job) -> float:
    """Forward-equivalents of a gradient pass over the pool; a pair's weight in its loss takes policy and reference."""
    return target_passes(job) + (2.0 if job.pair_gradients else 0.0)


def sample_of(n: int, size: int) -> np.ndarray:
    """Indices of the rows that are scored exactly too, spread over all n."""
    return np.unique(np.linspace(0, n - 1, size).round().astype(int))


def stored_influence(
    job: Job, model: Any, what: str, rows: Sequence[Encoded], target: GradientTarget, checkpoint: Path, kind: str,
    ids: tuple[list[str], list[str]],
) -> Arrays:  # fmt: skip
    """Dots, norms and momentum shares of all rows, estimated from the store of one checkpoint and map.

    Args:
        job: its recipe's `gradients` names the store; rows that it lacks are added, in the pool's order.
        model: the base with the checkpoint's adapter.
        what: the stage's name in `costs.jsonl` and on screen.
        rows: the job's rows as they are scored.
        target: of `target_vectors` at this checkpoint.
        checkpoint: its folder.
        kind: the gradient map.
        ids: what the entries of the pass and of the sample in `costs.jsonl` are found by.

    Returns:
        The columns of `Dots`, and the store's error on a sample that is scored exactly too:
        `store_rms` (of a cosine) and `store_spearman` (median over tasks); NaN without a sample.

    Raises:
        PlanMismatch: the store was made with another model, checkpoint, template, map, size or other first rows.
    """
    from keepset.features.adam import load_adam
    from keepset.features.influence import influence
    from keepset.features.projection import project_target, store_error, target_lengths

    spec, adam = job.recipe.gradients, load_adam(checkpoint)
    store = filled(job, model, what, rows, adam, open_store(job, checkpoint, kind), ids[0])
    dots = store.dots(project_target(store.sketch, target, map=kind, adam=adam))
    rms = spearman = float("nan")
    if spec.store_sample:
        at = sample_of(len(rows), spec.store_sample)
        sample = take(rows, at)
        with spending(job, f"sample of {what}", sample, ids[1]):
            exact = influence(
                model, sample, target, adam=adam, map=kind, token_budget=job.recipe.batching.token_budget,
                last_layers=spec.last_layers,
            )  # fmt: skip
        error = store_error(dots[at], exact.dots, exact.norms, target_lengths(target))
        rms, spearman = error.rms, float(np.median(error.spearman))
    return {
        "dots": dots, "norms": store.norms, "momentum": store.momentum, "store_rms": np.array(rms),
        "store_spearman": np.array(spearman),
    }  # fmt: skip


def open_store(job: Job, checkpoint: Path, kind: str) -> GradientStore:
    """The store of the recipe for one checkpoint and map."""
    from keepset.features.gradient_store import GradientStore
    from keepset.features.projection import dimension_for

    spec = job.recipe.gradients
    depends = {
        "model": job.fingerprint, "encoder": job.encoder.fingerprint, "adapter": digest(weights_of(checkpoint)),
        "last_layers": str(spec.last_layers), "max_completion_tokens": str(spec.max_completion_tokens),
    }  # fmt: skip
    return GradientStore.create(
        Path(str(spec.store)) / f"{digest(depends)[:12]}-{kind}", depends,
        dim=spec.store_dim or dimension_for(spec.store_error), dtype=spec.store_dtype, map=kind,
    )  # fmt: skip


def filled(
    job: Job, model: Any, what: str, rows: Sequence[Encoded], adam: AdamState, store: GradientStore, ids: list[str]
) -> GradientStore:
    """The store with all rows in it."""
    from keepset.features.gradient_store import build_store

    pool, chunk = [str(i) for i in job.ids], len(plan_shards(job.ids, job.recipe.batching.shard_rows)[0])
    lacking = pick(rows, np.array([i for _, places in store.missing(pool, chunk) for i in places], dtype=np.int64))
    kept = len(rows) - len(lacking)
    job.say(f"store {store.path}: {kept} rows kept, {len(lacking)} to add")
    with spending(job, what, lacking, ids), job.tracked(what, len(rows), there=kept) as advance:
        return build_store(
            store, model, rows, pool, adam=adam, token_budget=job.recipe.batching.token_budget, chunk=chunk,
            progress=advance, last_layers=job.recipe.gradients.last_layers,
        )  # fmt: skip


@contextmanager
def spending(job: Job, what: str, rows: Sequence[Encoded], ids: list[str]) -> Iterator[None]:
    """Log a gradient pass over rows; nothing where there are none."""
    with job.run.timed(what, rows=len(rows), ids=ids) as spent:
        yield
        n_tokens, n_head = count_tokens(rows)
        passes = gradient_passes(job)
        spent.update(tokens=n_tokens, flops=flops(job.loaded.model, n_tokens, n_head, passes=passes), skip=not rows)
