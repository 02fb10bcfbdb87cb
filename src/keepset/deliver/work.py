"""`keepset work`: one of several processes, on one machine or many, that do a run together in a shared run folder.

Every worker makes what methods need (trainings, gradients of the target, shards of the passes), whatever is possible
and nobody else is at. Then one of them leads: it scores, chooses, and puts the models to be trained on the board; all
train and evaluate them; the one that leads compares and writes the report. No process knows another: what one is at
it claims (`runfolder/claims.py`), and if it dies, also the one that leads, another goes on.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from rich.console import Console

from keepset.deliver.finish import run_job
from keepset.errors import KeepsetError
from keepset.methods.table import check_options
from keepset.pipeline.cells import cell_is_there, cells_task, read_board, write_board
from keepset.pipeline.learn import Learner
from keepset.pipeline.score import stages_of, take_part
from keepset.recipe import Recipe
from keepset.runfolder import layout
from keepset.runfolder.claims import LOOK_EVERY, PATIENCE, Busy, Claims
from keepset.runfolder.files import digest, share_folder
from keepset.runfolder.launchers import place_among, stand_alone
from keepset.runfolder.run import Run
from keepset.stages.executors import executor
from keepset.stages.job import Job
from keepset.stages.stage import JOBS, recipe_of


def work(
    recipe: Recipe, *, console: Console | None = None, out: Console | None = None, patience: float = PATIENCE
) -> None:
    """Take part in a run until it is finished; the recipe's folder is made where it isn't there yet.

    Args:
        recipe: what to do.
        console: where progress goes; default: standard error.
        out: where the tables go, if this process leads at the end; default: standard output.
        patience: seconds without a sign of life after which another worker counts as dead.

    Raises:
        KeepsetError: anything a user can mend.
    """
    for spec in recipe.methods:
        check_options(spec)
    run = Run(recipe.run_dir, worker=True)
    run.claims = claims = Claims(run.path / layout.CLAIMS_FOLDER, patience, place_among())
    stand_alone()
    share_folder(digest(claims.owner)[:8])
    with claims.holding("adopt", wait=True):
        if not run.is_free():
            raise KeepsetError(f"{run.path}: another keepset process works in this folder; wait for it")
        run.adopt(recipe)
    job = Job(recipe, console=console, worker=True)
    job.run.claims = claims
    JOBS[recipe_of(job)] = job  # what is claimed is done in this process, with what it has loaded
    _, before = read_board(job)
    take_part(job, [stage for spec in recipe.methods for stage in stages_of(job, spec).values()])
    learner = Learner(job)
    while True:
        names, finished = read_board(job)
        if finished not in ("", before):
            job.say("another worker has finished the run")
            return
        if claims.take("lead", fatal=True):
            try:
                lead(job, out or Console())
            finally:
                claims.release("lead")
            return
        with suppress(Busy):
            help_with(job, learner, names)
        time.sleep(LOOK_EVERY)


def lead(job: Job, out: Console) -> None:
    """Do the rest of the run with the help of all, and tell them when it is done."""
    job.worker = job.run.meter.worker = False
    job.run.wait = True
    (job.run.path / layout.BOARD).unlink(missing_ok=True)
    run_job(job, out)
    write_board(job, [], finished=os.urandom(8).hex())


def help_with(job: Job, learner: Learner, names: list[tuple[str, int | None]]) -> None:
    """Train and evaluate models of the board.

    Raises:
        Busy: what is left is what others are at.
    """
    job.run.wait = False
    executor(job).run(
        cells_task(job, names), list(range(len(names))), advance=lambda n: None,
        is_there=lambda n: cell_is_there(job, learner, *names[n]),
    )  # fmt: skip
