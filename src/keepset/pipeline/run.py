"""The steps of a run, each skipped where its result is already there: score, select, train, evaluate."""

from __future__ import annotations

from typing import Any

from keepset.errors import KeepsetError
from keepset.pipeline.cells import make_cell, share_cells
from keepset.pipeline.choose import (
    Subset,
    choose,
    choose_mix,
    control_methods,
    direct_subset,
    full_subset,
    stored_subset,
)
from keepset.pipeline.compare import Cell
from keepset.pipeline.findings import (
    MIXED,
    diagnose_edge,
    diagnose_leaks,
    diagnose_machines,
    diagnose_scores,
    diagnose_shares,
    record,
)
from keepset.pipeline.learn import Learner, evaluate_final, load_items
from keepset.pipeline.power import check_headline
from keepset.pipeline.reference_check import check_reference
from keepset.pipeline.score import make_stages, scored
from keepset.recipe import MethodSpec, Recipe
from keepset.runfolder import layout
from keepset.runfolder.records import Items, Kind
from keepset.stages.executors import executor
from keepset.stages.job import Job


def choose_all(job: Job) -> list[Subset]:
    """Score by every method and control, and select at every budget."""
    job.save_quarantine()
    _ = job.tokens  # the rows that every method and control share
    subsets: list[Subset] = []
    methods: list[tuple[MethodSpec, Kind]] = [(m, "method") for m in job.recipe.methods]
    make_stages(job, job.recipe.methods)
    for spec, kind in [*methods, *control_methods(job)]:
        scored(job, spec)
        chosen = [choose(job, spec.label, budget, kind=kind) for budget in job.recipe.budget]
        subsets += chosen
        if kind == "method":
            table = job.run.load_table(layout.scores(spec.label))
            record(job, diagnose_scores(table, spec.label, folds=job.recipe.reference.folds))
            for subset in chosen:
                record(job, diagnose_edge(subset) + diagnose_shares(table, subset.name, subset.ids(job)))
    record(job, diagnose_machines(job.run.path), anew=MIXED)
    if job.recipe.target:
        record(job, diagnose_leaks(job.pool, job.target, "target"))
    subsets += [choose_mix(job, mix) for mix in job.recipe.mix]
    if job.recipe.controls.full:
        subsets.append(full_subset(job))
    if job.recipe.controls.dpo_direct:
        subsets.append(direct_subset(job))
    return subsets


def train_and_evaluate(job: Job, subsets: list[Subset]) -> list[Cell]:
    """Train and evaluate every subset and seed; the base first."""
    learner = Learner(job)
    evaluation = job.recipe.evaluate
    if not (evaluation.pairs or evaluation.heldout or evaluation.gsm8k):
        job.say("evaluate: the recipe names no held-out pairs or rows, so nothing is trained or compared")
        record(job, check_reference(job, learner))
        return []
    check_headline(job, learner)
    if learner.eval_pairs:
        record(job, diagnose_leaks(job.pool, learner.eval_pairs[2], "evaluation"))
    record(job, check_reference(job, learner))
    plan = [(s, seed) for s in subsets for seed in seeds_for(job, s)]
    with_base = bool(job.recipe.controls.base or evaluation.pairs)
    who = executor(job)
    if who.trains:
        if with_base:
            share_cells(job, learner, who, [(None, None)])
        share_cells(job, learner, who, plan)
    base: Items | None = None
    cells: list[Cell] = []
    if with_base:
        _, base = evaluate_final(job, learner, "base", None, None)
        cells.append(Cell(None, None, base))
    for number, (subset, seed) in enumerate(plan, start=1):
        job.say(f"model {number} of {len(plan)}: {subset.name}, seed {seed}")
        cells.append(Cell(subset, seed, make_cell(job, learner, subset, seed, base)))
    return cells


def evaluated_cells(job: Job) -> list[Cell]:
    """What the run folder has evaluated already: the base, and each subset and seed.

    Raises:
        KeepsetError: nothing is evaluated yet.
    """
    folder = job.run.path / layout.EVALUATION_FOLDER
    cells: list[Cell] = []
    for path in sorted(folder.glob(f"*/{layout.DONE}")):
        named = layout.name_and_seed(path.parent.name)
        job.run.require_whole(layout.evaluation(path.parent.name, None))
        subset, seed = (stored_subset(job, named[0]), named[1]) if named else (None, None)
        cells.append(Cell(subset, seed, load_items(path.parent)))
    if not cells:
        raise KeepsetError(f"{folder}: nothing evaluated yet; `keepset run`, or `train` and then `evaluate`")
    return sorted(cells, key=lambda cell: table_order(job.recipe, cell))


def table_order(recipe: Recipe, cell: Cell) -> tuple[Any, ...]:
    """Where a cell stands in the table, the order in which `run` makes them: the base, methods, controls, mixes."""
    subset, seed = cell.subset, cell.seed
    if subset is None:
        return (-1,)
    labels = [m.label for m in recipe.methods] + [f"random-{k}" for k in recipe.controls.random_seeds]
    labels += ["longest", "shortest", *(m.label for m in recipe.mix), "full", "dpo-direct"]
    budgets = [str(b) for b in recipe.budget]
    place = labels.index(subset.label) if subset.label in labels else len(labels)
    return place, budgets.index(subset.budget) if subset.budget in budgets else len(budgets), subset.name, seed or 0


def seeds_for(job: Job, subset: Subset) -> list[int]:
    """Training seeds of a subset: all of `train_seeds`; Random's subsets take one each, in turn."""
    seeds = job.recipe.train_seeds
    if subset.kind != "random":
        return seeds
    draws = [f"random-{seed}" for seed in job.recipe.controls.random_seeds]
    return [seeds[draws.index(subset.label) % len(seeds)]]
