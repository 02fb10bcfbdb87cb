"""`keepset run`: the whole job, from a recipe to a folder that shows, explains and repeats what was chosen."""

from __future__ import annotations

import time

from rich.console import Console

from keepset.deliver.card import write_dataset
from keepset.deliver.trainers import write_trainers
from keepset.methods.table import check_options
from keepset.pipeline.compare import compare, print_comparison, tell_selection_cost
from keepset.pipeline.findings import COMPARED, diagnose_comparison, record
from keepset.pipeline.manifest import write_manifest
from keepset.pipeline.run import choose_all, train_and_evaluate
from keepset.pipeline.tell_truth import print_validation
from keepset.pipeline.validate import validate
from keepset.pipeline.variants import run_variants
from keepset.progress import looking_ahead
from keepset.recipe import Recipe
from keepset.report import write_report
from keepset.report.overlap import print_agreement
from keepset.runfolder import layout
from keepset.runfolder.status import outlook
from keepset.stages.job import Job


def run_recipe(
    recipe: Recipe, *, console: Console | None = None, out: Console | None = None, force: bool = False
) -> Job:
    """Do the whole job and print the comparison.

    Progress goes to `console` (default: standard error), the tables to `out` (default: standard output). For `force`
    see `Run.adopt`.

    Raises:
        KeepsetError: anything a user can mend.
    """
    for spec in recipe.methods:
        check_options(spec)
    job = Job(recipe, console=console, force=force)
    run_job(job, out or Console(), force=force)
    return job


def run_job(job: Job, out: Console, *, force: bool = False) -> None:
    """Do the whole of a job.

    Args:
        job: the job.
        out: where the tables go.
        force: see `Run.adopt`; of the variants' folders.
    """
    ahead = job.recipe.model_dump(mode="json")
    with job.run.lock(), looking_ahead(lambda: outlook(job.run.path, ahead)):
        start = time.perf_counter()
        subsets = choose_all(job)
        cells = train_and_evaluate(job, subsets)
        result = compare(job, cells)
        record(job, diagnose_comparison(result), anew=COMPARED)
        agreements = run_variants(job, force=force) if job.recipe.variants else {}
        for label, agreement in agreements.items():
            job.say(f"{label}: agreement over variants")
            print_agreement(agreement, out)
        truth = validate(job) if job.recipe.validation else None
        first = next((s for s in subsets if s.kind == "method"), None)
        if first is not None:
            write_dataset(job, first)
            write_trainers(job, first)
        write_manifest(job, time.perf_counter() - start)
        write_report(job.run.path)
        if cells:
            print_comparison(result, out)
        if truth is not None:
            print_validation(truth, out)
        job.say(tell_selection_cost(result.selection))
        job.say(f"report: {job.run.path / layout.REPORT}")
        job.say(f"run folder: {job.run.path}")
