"""What choosing and training cost, from counts: what `plan` times and `compare` prices.

A method's price is that of its stages and of all that they need; several methods together pay for what they share once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from keepset.budget_text import parse_budget
from keepset.lazy import pick
from keepset.pipeline.learn import Learner, direct_args
from keepset.pipeline.reference_check import rows_to_check
from keepset.pipeline.score import stages_of
from keepset.runfolder import layout
from keepset.runfolder.records import Cost, SelectionCost, StageCost
from keepset.stages.losses import Losses, forward
from keepset.stages.rows import rows_outside
from keepset.stages.stage import Stage, Work, closure
from keepset.stages.trained import training

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.pipeline.choose import Subset
    from keepset.recipe import MethodSpec
    from keepset.stages.job import Job


@dataclass(frozen=True)
class Users:
    """Whose a work is: the labels of methods, and the stages that it is the price of."""

    labels: dict[str, None]
    stages: dict[Stage, None]


def users_of(job: Job, methods: Sequence[MethodSpec]) -> dict[Work, Users]:
    """The model stages' works that `methods` need, each once, with its users."""
    users: dict[Work, Users] = {}
    for spec in methods:
        for stage in closure(job, stages_of(job, spec).values()):
            for work in stage.works(job):
                of = users.setdefault(work, Users({}, {}))
                of.labels[spec.label] = None
                of.stages[stage] = None
    return users


def selection_work(job: Job, methods: Sequence[MethodSpec]) -> list[Work]:
    """The model stages that `methods` need together, each counted once. Methods without a model need none."""
    users = {work: list(of.labels) for work, of in users_of(job, methods).items()}
    named: dict[str, list[Work]] = {}
    for work in users:
        named.setdefault(work.stage, []).append(work)
    return [together(works, [m.label for m in methods], users) for works in named.values()]


def together(works: list[Work], labels: list[str], users: dict[Work, list[str]]) -> Work:
    """Works of one name as one: their rows add up over parts, all else over all of them."""
    first = works[0]
    whose = {label for work in works for label in users[work]}
    return replace(
        first,
        stage=f"{first.stage} x{len(works)}" if first.counted else first.stage,
        rows=sum({work.part: work.rows for work in works}.values()),
        tokens=sum(work.tokens for work in works),
        flops=sum(work.flops for work in works),
        ids=tuple(dict.fromkeys(i for work in works for i in work.ids)),
        titles=tuple(dict.fromkeys(title for work in works for title in work.titles)),
        trainings=sum(work.trainings for work in works),
        part="",
        counted=False,
        methods=", ".join(label for label in labels if label in whose),
    )


def cost_of(job: Job, subset: Subset | None) -> Cost:
    """What choosing and training cost: FLOPs by count, as if the method ran alone, and the seconds that were logged.

    Seconds sum every entry of a stage, so that a resumed run counts its first part too; a pass that several methods
    shared counts in full for each of them.
    """
    if subset is None:
        return Cost(0.0, 0.0, 0.0, 0.0)
    spec = next((m for m in job.recipe.methods if m.label == subset.label), None)
    works = selection_work(job, [spec]) if spec else []
    costs, own = job.run.costs(), f"score {subset.label}"
    chosen = [e for e in costs if any(w.logged(e) for w in works) or (not works and e["stage"] == own)]
    trained = [e for e in costs if e["stage"].startswith(f"train {layout.model(subset.name, '')}")]
    seeds = len({e["stage"] for e in trained}) or 1
    return Cost(
        select_seconds=round(sum(e["seconds"] for e in chosen), 2),
        select_flops=sum(w.flops for w in works),
        train_seconds=round(sum(e["seconds"] for e in trained) / seeds, 2),
        train_flops=sum({e["stage"]: e.get("flops", 0.0) for e in trained}.values()) / seeds,
    )


def selection_cost(job: Job, full: float) -> SelectionCost:
    """What choosing by all the recipe's methods took, stages they share counted once; `full`: as below."""
    costs, works = job.run.costs(), selection_work(job, job.recipe.methods)
    stages = [
        StageCost(
            work.stage, work.methods, work.rows, work.tokens, work.flops,
            round(sum(e["seconds"] for e in costs if work.logged(e)), 2),
        )
        for work in works
    ]  # fmt: skip
    flops = sum(work.flops for work in works)
    # A sweep of two losses is logged once and stands under both its stages.
    seconds = sum(e["seconds"] for e in costs if any(work.logged(e) for work in works))
    tokens = sum(work.tokens for work in works)
    return SelectionCost(flops, tokens, round(seconds, 2), flops / full if full else None, tuple(stages))


def full_training_flops(job: Job) -> float:
    """FLOPs of training on the whole usable pool with the recipe's `train`."""
    return training(job, "", job.sides[1], job.recipe.train).flops


@dataclass(frozen=True)
class Final:
    """What follows the choice: trainings, the check of the reference, and the evaluation of `models` models."""

    works: list[Work]
    models: int


def final_work(job: Job) -> Final:
    """Training and evaluating a model for every subset and seed; rows of middle length stand for the unknown choice."""
    recipe = job.recipe
    learner = Learner(job)
    sides: list[Encoded] = [side for pair in learner.eval_pairs[0] for side in pair] if learner.eval_pairs else []
    sides += learner.eval_rows[0] if learner.eval_rows else []
    if not sides:
        return Final([], 0)
    lengths = job.encoded.counts()[0][:, 0]
    works, models = [], 1
    for budget in recipe.budget:
        unit, amount = parse_budget(budget, len(job.rows), int(job.n_tokens().sum()))
        n_rows = min(len(job.rows), amount if unit == "rows" else max(1, int(amount / job.n_tokens().mean())))
        middle = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[:n_rows]
        longest = np.argsort(-job.n_tokens(), kind="stable")
        count = (len(recipe.methods) + len(recipe.mix)) * len(recipe.train_seeds) + len(recipe.controls.random_seeds)
        one = training(job, "", pick(job.sides[1], middle), recipe.train)
        works.append(times(one, count, f"train {count} models on {budget}", "methods, random"))
        models += count
        by_length = {"longest": longest[:n_rows], "shortest": longest[::-1][:n_rows]}
        for name in [name for name in by_length if getattr(recipe.controls, name)]:
            one = training(job, "", pick(job.sides[1], by_length[name]), recipe.train)
            works.append(times(one, 1, f"train on the {name} {budget}", name))
            models += 1
    if recipe.controls.full:
        one = training(job, "", job.sides[1], recipe.train)
        works.append(times(one, 1, "train on the full pool", "full"))
        models += 1
    if recipe.controls.dpo_direct:
        many = len(recipe.train_seeds)
        one = training(job, "", learner.target_pairs, direct_args(job))
        works.append(times(one, many, "DPO on the target's pairs", "dpo-direct"))
        models += many
    works += held_out_check(job, learner)
    works.append(times(forward(job, "", sides), models, f"evaluate {models} models", "all"))
    return Final(works, models)


def times(work: Work, n: int, stage: str, methods: str) -> Work:
    """The same work done n times, under a name."""
    return replace(
        work, stage=stage, methods=methods, rows=work.rows * n, tokens=work.tokens * n, flops=work.flops * n,
        trainings=work.trainings * n,
    )  # fmt: skip


def held_out_check(job: Job, learner: Learner) -> list[Work]:
    """Base and reference on evaluation rows, which tell whether the reference learnt more than its own rows."""
    labels, rows = rows_to_check(job, learner)
    if not rows:
        return []
    outside = rows_outside(rows)
    works = [work for model in ("base", "reference") for work in Losses(model, outside=outside).works(job)]
    return [together(works, labels, {work: labels for work in works})]
