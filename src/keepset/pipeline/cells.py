"""The final models of a comparison: each is trained and evaluated by itself, here or wherever an executor says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keepset.errors import KeepsetError
from keepset.pipeline.choose import stored_subset
from keepset.pipeline.learn import (
    Learner,
    evaluate_epochs,
    evaluate_final,
    evaluation_key,
    final_key,
    load_items,
    train_final,
)
from keepset.runfolder import layout
from keepset.runfolder.execute import Executor, Task
from keepset.runfolder.files import canonical, digest, file_digest, write_atomic
from keepset.runfolder.records import Items
from keepset.stages.stage import job_of, recipe_of

if TYPE_CHECKING:
    from keepset.pipeline.choose import Subset
    from keepset.stages.job import Job

BASE = "base"


@dataclass(frozen=True)
class Cells:
    """Models to train and evaluate: names of stored subsets with their seeds; the base has none."""

    recipe: str
    plan: tuple[tuple[str, int | None], ...]


def make_cells(own: Cells, numbers: Sequence[int]) -> None:
    """Train and evaluate some models, in whatever process; what was done before is kept."""
    job = job_of(own.recipe)
    learner = job.once_a_recipe("learner", lambda: Learner(job))
    for number in numbers:
        name, seed = own.plan[number]
        if seed is None:
            evaluate_final(job, learner, name, None, None)
        else:
            make_cell(job, learner, stored_subset(job, name), seed, base_items(job))


def make_cell(job: Job, learner: Learner, subset: Subset, seed: int, base: Items | None) -> Items:
    """Train one model and evaluate it; what was done before is kept."""
    if train_final(job, learner, subset, seed)["reused"]:
        job.say(f"{subset.name}: trained before, kept")
    _, items = evaluate_final(job, learner, subset.name, seed, base)
    if job.recipe.evaluate.each_epoch and not job.recipe.train.full:
        evaluate_epochs(job, learner, subset.name, seed, base, items)
    return items


def base_items(job: Job) -> Items | None:
    """The untrained base's items; None where it wasn't evaluated."""
    folder = job.run.path / layout.evaluation(BASE, None)
    return load_items(folder) if (folder / layout.DONE).exists() else None


def share_cells(job: Job, learner: Learner, who: Executor, plan: Sequence[tuple[Subset | None, int | None]]) -> None:
    """Have models trained and evaluated by an executor; None is the base.

    With workers beside this process, the plan goes on their board.
    """
    names = [(BASE if subset is None else subset.name, seed) for subset, seed in plan]
    if job.run.claims is not None:
        write_board(job, names)
    kept = (layout.SUBSETS, layout.SUBSETS_FOLDER, layout.evaluation(BASE, None))
    task = cells_task(job, names, kept)

    def is_there(number: int) -> bool:
        return cell_is_there(job, learner, *names[number])

    missing = [number for number in range(len(plan)) if not is_there(number)]
    if missing:
        job.say(f"{len(missing)} of {len(plan)} models are trained and evaluated by workers")
        who.run(task, missing, is_there=is_there, advance=lambda n: job.say(f"{names[n][0]}, seed {names[n][1]}: done"))
        job.run.meter.collect()


def cell_is_there(job: Job, learner: Learner, name: str, seed: int | None) -> bool:
    """Whether a stored subset's model is trained and evaluated, as the recipe and the data are now."""
    folder, epochs = layout.evaluation(name, seed), job.recipe.evaluate.each_epoch and not job.recipe.train.full
    if job.run.done(folder) is None:
        return False
    if seed is not None:
        key = final_key(job, learner, stored_subset(job, name), seed)
        if job.run.whole(layout.model(name, seed), key) is None:
            return False
        if epochs and job.run.done(layout.epochs(name, seed)) is None:
            return False
    weights = None if seed is None else job.run.path / layout.model(name, seed)
    return job.run.whole(folder, evaluation_key(job, learner, weights)) is not None


def cells_task(job: Job, names: Sequence[tuple[str, int | None]], reads: tuple[str, ...] = ()) -> Task:
    """The task of some cells."""
    own = Cells(recipe_of(job), tuple(names))
    return Task(make_cells, own, digest(["cells", own.plan])[:16], reads)


# -- the board of `keepset work` --------------------------------------------------------------------------------------


def write_board(job: Job, names: Sequence[tuple[str, int | None]], *, finished: str = "") -> None:
    """Say what there is to do for all workers, or (`finished`: another word each time) that all is done."""
    board = {"recipe": file_digest(job.run.path / layout.RECIPE), "cells": list(names), "finished": finished}
    write_atomic(job.run.path / layout.BOARD, canonical(board).encode())


def read_board(job: Job) -> tuple[list[tuple[str, int | None]], str]:
    """The models to make, and the word of its end; nothing where the board is another recipe's.

    Raises:
        KeepsetError: it is damaged.
    """
    path = job.run.path / layout.BOARD
    try:
        board = json.loads(path.read_text(encoding="utf-8"))
        if board["recipe"] != file_digest(job.run.path / layout.RECIPE):
            return [], ""
        return [(str(name), None if seed is None else int(seed)) for name, seed in board["cells"]], board["finished"]
    except FileNotFoundError:
        return [], ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise KeepsetError(f"{path}: damaged; delete it and start the same command again") from None
