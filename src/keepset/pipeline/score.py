"""Scoring: a method's stages are computed, its formula is applied, and the table of scores is kept under a key."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from keepset.methods.method import Features, Method
from keepset.methods.table import METHODS, check_options, method_of
from keepset.recipe import MethodSpec
from keepset.row_ids import Ids, order_by
from keepset.runfolder import layout
from keepset.runfolder.claims import LOOK_EVERY, Busy
from keepset.runfolder.files import canonical, canonical_list
from keepset.stages.executors import executor
from keepset.stages.influence import Dots
from keepset.stages.stage import VERSION, Stage, Sweep, closure, complete, make_needs

if TYPE_CHECKING:
    from keepset.stages.job import Job


def score_key(job: Job, spec: MethodSpec) -> str:
    """Hash (sha256, hex) of everything that the table `scores/<label>.parquet` depends on.

    The method with its options, the rows and what stands beside their scores, the target that it looks at, and its
    stages with all that they need. What changes no number (batches, workers, folders) is left out.
    """
    method = method_of(spec)
    target = job.aim(spec.shots).target.fingerprint() if "target" in method.needs else None
    rest: dict[str, Any] = {
        "version": VERSION,
        "method": [spec.name, {name: getattr(method, name) for name in method.options()}],
        "ids": job.ids_digest,
        "pool": [job.pool.fingerprint(), job.pool.has_pairs],
        "encoder": None if job.text_only else job.encoder.fingerprint,  # usable rows and their lengths
        "target": target,
        "stages": {name: stage.id(job) for name, stage in stages_of(job, spec).items()},
    }
    whole = job.once_a_recipe("columns", lambda: hashed_columns(job)).copy()
    whole.update(canonical(rest)[1:].encode())
    return whole.hexdigest()


def hashed_columns(job: Job) -> Any:
    """The hash of canonical JSON so far: what a score's key holds of `columns`, its first entry, a value for each row.

    Every table of scores is made of the pool's sources and categories; they are spelt out once, and never as a whole.
    """
    whole = hashlib.sha256(b'{"columns":[')
    for piece in chain(canonical_list(job.pool.sources()), [b","], canonical_list(job.pool.categories()), [b"],"]):
        whole.update(piece)
    return whole


def stages_of(job: Job, spec: MethodSpec) -> dict[str, Stage]:
    """What a method of the recipe needs computed."""
    return method_of(spec).stages(job, spec.shots)


def make_stages(job: Job, specs: Iterable[MethodSpec]) -> None:
    """Where others take part: have made what methods need, with as many at it as there are; else nothing.

    What is left to the process that scores: gradient stores, and retraining, where each training hangs on the last.
    """
    stages = [stage for spec in specs for stage in stages_of(job, spec).values()]
    if not stages or not (who := executor(job)).trains:
        return
    if not who.here:
        make_needs(job, stages, who)
    else:
        take_part(job, stages)


def take_part(job: Job, stages: Sequence[Stage]) -> None:
    """Make what stages need as one of several workers: whatever is possible and nobody else is at."""
    order = closure(job, stages)
    left = list(order)
    wait, job.run.wait = job.run.wait, False
    try:
        while left:
            before = len(left)
            for stage in order:
                if stage in left and not any(need in left for need in stage.needs(job)):
                    with suppress(Busy):
                        for made in make(job, stage, left):
                            left.remove(made)
            if len(left) == before:
                time.sleep(LOOK_EVERY)
    finally:
        job.run.wait = wait


def make(job: Job, stage: Stage, left: Sequence[Stage]) -> list[Stage]:
    """Have a stage's result in the run folder, with those that go through its pass; which these were."""
    if isinstance(stage, Sweep):
        if isinstance(stage, Dots) and job.recipe.gradients.store:
            return [stage]
        possible = [s for s in left if type(s) is type(stage) and not any(need in left for need in s.needs(job))]
        group = [s for s in possible if isinstance(s, Sweep) and s.together(job) == stage.together(job)]
        complete(job, group)
        return list(group)
    if stage.kept(job) is not None:
        stage.value(job)
    return [stage]


def scored(job: Job, spec: MethodSpec) -> None:
    """Score by a method unless this folder has its whole scores, made of the same rows, models and options."""
    if job.run.saved_key(layout.scores(spec.label)) == score_key(job, spec):
        job.say(f"{spec.label}: scored before, kept")
        return
    score(job, spec)


def score(job: Job, spec: MethodSpec) -> pa.Table:
    """Score every usable row by one method and write `scores/<label>.parquet`.

    Returns id, source, category, score, rank (1 = best; null where unscored), selected (all false), n_tokens, reason
    (why a row has no score), the method's parts. Rows are in the pool's order.

    Raises:
        RecipeError: unknown method or option, or a recipe or data that the method can't score.
    """
    method = check_options(spec)
    job.save_quarantine()
    make_stages(job, [spec])
    with job.run.timed(f"score {spec.label}") as spent:
        features = Features(job, stages_of(job, spec), spec.shots, beside=gradients_beside(job, spec, method))
        scores = method.score(features)
        spent["rows"] = len(scores.score)
    values = np.asarray(scores.score, dtype=np.float64)
    finite = np.isfinite(values)
    rank = np.zeros(len(values), dtype=np.int64)
    rank[ranking(values, job.ids)] = np.arange(1, len(values) + 1)
    rows = job.pool.table.select(["id", "source", "category"])
    if len(job.usable) < len(job.pool):
        rows = rows.filter(pa.array(np.isin(np.arange(len(job.pool)), job.usable, assume_unique=True)))
    table = pa.table(
        {
            "id": rows["id"],
            "source": rows["source"],
            "category": rows["category"],
            "score": pa.array(np.where(finite, values, np.nan), mask=~finite),
            "rank": pa.array(rank, mask=~finite),
            "selected": pa.repeat(False, len(values)),
            "n_tokens": pa.array(job.n_tokens()),
            "reason": reasons(values, finite),
            **{name: pa.array(part) for name, part in scores.parts.items()},
        }
    ).replace_schema_metadata(
        {"method": spec.name, "label": spec.label, "options": str(spec.options), "length_unit": job.length_unit}
    )
    job.run.save_table(layout.scores(spec.label), table, key=score_key(job, spec), solid=True)
    job.pool.forget()
    bad = int((~finite).sum())
    job.say(f"{spec.label}: {len(values)} rows in = {len(values) - bad} scored + {bad} quarantined")
    return table


def reasons(values: np.ndarray, finite: np.ndarray) -> pa.Array:
    """Why each row has no score; null where it has one."""
    if finite.all():
        return pa.nulls(len(values), pa.string())
    return pa.array(np.where(np.isnan(values), "nan-score", "infinite-score"), pa.string(), mask=finite)


def gradients_beside(job: Job, spec: MethodSpec, method: Method) -> list[Stage]:
    """The dots that the recipe's other gradient methods of the same target will ask for: one pass serves all."""
    if "gradients" not in method.needs:
        return []
    others = [m for m in job.recipe.methods if m.shots == spec.shots and "gradients" in METHODS[m.name].needs]
    return [stage for m in others for stage in stages_of(job, m).values() if isinstance(stage, Dots)]


def text_features(job: Job, rows: np.ndarray) -> Features:
    """What a method without a model is given of some rows (indices): to time it."""
    return Features(job, {}, rows=rows)


def ranking(scores: np.ndarray, ids: Ids | np.ndarray) -> np.ndarray:
    """Indices best first; ties by id, NaN and infinite last."""
    return order_by(np.where(np.isfinite(scores), -scores, np.inf), ids)
