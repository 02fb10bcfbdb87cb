"""Who computes for a job: as its recipe says, or beside the other workers on its run folder."""

from __future__ import annotations

import os
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
        return Shared(job.run.claims, job.run.wait, place_among())
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


def place_among() -> float:
    """Where among its fellows this process stands, from 0 to below 1, as launchers say it; 0 where none does.

    Nothing depends on it but the order in which shards are looked at, so a wrong one does no harm.
    """
    for rank, size, first in (
        ("RANK", "WORLD_SIZE", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", ""),
        ("JOB_COMPLETION_INDEX", "WORLD_SIZE", ""),
    ):
        try:
            number, of = int(os.environ[rank]), int(os.environ[size])
            start = int(os.environ.get(first) or 0) if first else 0
        except (KeyError, ValueError):
            continue
        if of > 0:
            return ((number - start) % of) / of
    return 0.0
