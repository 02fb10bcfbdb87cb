"""Who computes for a job: as its recipe says, or beside the other workers on its run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepset.errors import RecipeError
from keepset.runfolder.execute import Executor, Forks, Here, Shared

if TYPE_CHECKING:
    from keepset.stages.job import Job


def executor(job: Job) -> Executor:
    """This process, forks of it where `batching.workers` says so, Ray's actors, or all that share the folder.

    Raises:
        RecipeError: several workers, and the model is on a GPU, which forks can't share.
    """
    spec, workers = job.recipe.executor, job.recipe.batching.workers
    if job.run.claims is not None:
        return Shared(job.run.claims, job.run.wait)
    if spec.name == "ray" and not job.worker:
        from keepset.runfolder.execute_ray import ray_executor

        gpus = job.recipe.model.device != "cpu"
        return ray_executor(job.run.path, spec.address, spec.workers, gpus, job.say)
    if workers == 1 or job.worker:
        return Here()
    from keepset.model.load import pick_device

    if pick_device(job.recipe.model.device) != "cpu":
        raise RecipeError(f"batching.workers: {workers} processes score on the CPU only; leave it at 1 on a GPU")
    return Forks(workers)
