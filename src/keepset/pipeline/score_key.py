"""What a method's stored scores are made of: the hash by which a run folder knows that they are still right.

All of it stands in the recipe, the data and the weights that are given from outside; weights that the run trains are
named by what they are trained from. What changes no number (batches, workers, folders) is left out, and so is whatever
the method doesn't look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepset.methods.gradient import with_defaults
from keepset.methods.table import METHODS, needs_model
from keepset.recipe import MethodSpec
from keepset.runfolder.files import digest
from keepset.stages.influence import gradient_key
from keepset.stages.losses import VERSION, embedding_weights, reference_model, train_key, warmup_rows, weights_of
from keepset.stages.shapley import retraining_args

if TYPE_CHECKING:
    from keepset.stages.job import Job


def score_key(job: Job, spec: MethodSpec) -> str:
    """Hash (sha256, hex) of everything that the table `scores/<label>.parquet` depends on."""
    needs, options = set(METHODS[spec.name].needs), with_defaults(spec.name, spec.options)
    found: dict[str, Any] = {
        "version": VERSION,
        "method": [spec.name, options],
        "ids": [str(i) for i in job.ids],
        "pool": [job.pool.fingerprint(), job.pool.has_pairs],
        "columns": [job.pool.sources().tolist(), job.pool.categories().tolist()],  # they stand beside the scores
        "encoder": None if job.text_only else job.encoder.fingerprint,  # usable rows and their lengths
    }
    if options.get("embedding_model"):
        found["embedding_model"] = embedding_weights(options["embedding_model"])
    elif needs_model(spec.name):
        found["model"] = job.fingerprint
    if "target" in needs:
        target = job.target if spec.shots is None else job.target.shots(spec.shots, job.recipe.seed)
        found["target"] = target.fingerprint()
    if "reference" in needs:
        found["reference"] = reference_inputs(job)
    if needs & {"warmup", "gradients"}:
        found["warmup"] = warmup_inputs(job, last=bool(needs & {"curvature", "in-run"}))
    if "gradients" in needs:
        found["gradients"] = [gradient_key(job), store_inputs(job)]
    if "retraining" in needs:
        found["retraining"] = retraining_args(job)
    return digest(found)


def reference_inputs(job: Job) -> Any:
    """What the reference is trained from, or its weights where it is from elsewhere."""
    spec = job.recipe.reference
    if spec.path:
        return reference_model(job)[1]
    return train_key(job, spec, job.ids, job.recipe.seed)


def warmup_inputs(job: Job, *, last: bool) -> Any:
    """What the warm-up is trained from, or its checkpoints' weights and rates; of the last one alone, or of all."""
    from keepset.train.warmup import list_checkpoints

    spec, last = job.recipe.warmup, last or job.recipe.warmup.checkpoints == "last"
    if spec.path:
        found = list_checkpoints(Path(spec.path))
        return [[c.mean_lr, weights_of(c.path)] for c in (found[-1:] if last else found)]
    picked, seed = warmup_rows(job)
    return ["last" if last else "all", train_key(job, spec, job.ids[picked], seed)]


def store_inputs(job: Job) -> Any:
    """What a gradient store's estimates depend on; None without one."""
    from keepset.features.projection import dimension_for

    spec = job.recipe.gradients
    if spec.store is None:
        return None
    return [spec.store_dim or dimension_for(spec.store_error), spec.store_dtype, spec.store_sample]
