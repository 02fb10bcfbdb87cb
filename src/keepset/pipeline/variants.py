"""The same scoring with other keys (another model, seed, reference ...), and how far its choice agrees: `variants`."""

from __future__ import annotations

from keepset.pipeline.run import choose_all
from keepset.recipe import variant_recipe
from keepset.runfolder import layout
from keepset.runfolder.records import Agreement
from keepset.selection.agreement import agreement
from keepset.stages.job import Job

OWN = "recipe"  # what the recipe's own scoring is called


def run_variants(job: Job, *, force: bool = False) -> dict[str, Agreement]:
    """Score by every variant, and write each method's agreement over all of them (`overlap.json`), which is returned.

    What a variant shares with the recipe (the base's losses, a reference trained alike) comes from the recipe's folder.
    """
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
    job.run.save_json(layout.OVERLAP, {label: one.to_json() for label, one in result.items()})
    return result
