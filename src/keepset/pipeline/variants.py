"""The same scoring with other keys (another model, seed, reference ...), and how far its choice agrees: `variants`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from keepset.recipe import variant_recipe
from keepset.report.overlap import agreement, print_agreement
from keepset.runfolder import layout
from keepset.stages.job import Job

OWN = "recipe"  # what the recipe's own scoring is called


def run_variants(job: Job, out: Console | None, *, force: bool = False) -> dict[str, Any]:
    """Score by every variant, and write and print each method's agreement over all of them (`overlap.json`).

    What a variant shares with the recipe (the base's losses, a reference trained alike) comes from the recipe's folder.
    """
    from keepset.pipeline.run import choose_all

    recipe = job.recipe
    jobs = {OWN: job}
    for variant in recipe.variants:
        changed = ", ".join(f"{k}: {v}" for k, v in variant.set.items())
        job.say(f"variant {variant.label}: {changed}")
        folder = f"{recipe.run_dir}/{layout.variant(variant.label)}"
        own = variant_recipe(recipe, variant).model_copy(update={"run_dir": folder})
        sub = Job(own, console=job.console, force=force)
        sub.run.lenders = [job.run.path]
        with sub.run.lock():
            choose_all(sub)
        jobs[variant.label] = sub
    result = {}
    for method in recipe.methods:
        tables = {name: one.run.load_table(layout.scores(method.label)) for name, one in jobs.items()}
        result[method.label] = agreement(tables, recipe.budget)
    job.run.save_json(layout.OVERLAP, result)
    for label, found in result.items():
        job.say(f"{label}: agreement over variants")
        print_agreement(found, out or Console())
    return result
