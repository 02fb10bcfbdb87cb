"""What a recipe's stages take on a cluster, in counts: rows, tokens, operations, bytes; of a pool of any size."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from keepset.data import load_pool
from keepset.features.embeddings import TextEncoder
from keepset.model.outline import adapter_numbers, outline, weight_bytes
from keepset.recipe import Recipe
from keepset.stages.encoded import encode_pool
from keepset.stages.influence import Dots, TargetGradients, store_inputs
from keepset.stages.job import Job
from keepset.stages.losses import Losses
from keepset.stages.representations import Embeddings, Representations, TargetEmbeddings, TargetRepresentations
from keepset.stages.stage import Stage, Work
from keepset.stages.trained import Reference, Warmup, WarmupCheckpoint

TIMED_ROWS = 2_000  # of the pool: encoding them is timed here


class Counts:
    """A recipe's job without weights, and what its pool's rows take, as if there were `rows` of them."""

    def __init__(self, recipe: Recipe, rows: int | None, console: Console | None) -> None:
        """Read and encode the pool, and time both; the recipe's run folder isn't looked at."""
        self.folder = tempfile.TemporaryDirectory(prefix="keepset-plan-")
        self.job = job = Job(recipe.model_copy(update={"run_dir": self.folder.name}), console=console)
        self.recipe, loaded = recipe, outline(recipe.model)
        job.held["model"] = loaded
        job.__dict__["encoder"] = loaded.encoder
        load_pool([spec.model_copy(update={"limit": 1}) for spec in recipe.pool])  # imports
        self.read_row = processor(lambda: job.pool) / max(1, job.pool.n_in)
        self.here = len(job.rows)
        self.n = rows or self.here
        self.scale = self.n / self.here
        few = job.pool.take(np.arange(min(len(job.pool), TIMED_ROWS)))
        self.encode_row = processor(lambda: encode_pool(few, job.encoder)) / len(few)
        lengths = job.encoded.counts()[0]
        self.tokens = int(lengths.sum() * self.scale)
        self.pool_bytes = job.pool.table.nbytes * self.scale
        self.token_bytes = 5.0 * self.tokens + (13.0 * lengths.shape[1] + 16) * self.n
        self.weights = float(weight_bytes(loaded.model))
        self.adapter = 4.0 * adapter_numbers(loaded.model, recipe.lora)

    def grown(self, work: Work, factor: float) -> Work:
        """A work over a pool that is larger by a factor."""
        rows, tokens = round(work.rows * factor), round(work.tokens * factor)
        return replace(work, rows=rows, tokens=tokens, flops=work.flops * factor)

    def factor(self, stage: Stage) -> float:
        """How much larger a stage's work is than that of the rows at hand: the target stays."""
        if isinstance(stage, TargetGradients | TargetRepresentations | TargetEmbeddings):
            return 1.0
        if isinstance(stage, Warmup):
            spec = self.recipe.warmup
            drawn = [min(n, max(spec.min_rows, int(spec.fraction * n + 1e-9))) for n in (self.here, self.n)]
            return drawn[1] / drawn[0]
        return self.scale

    def processes(self, stage: Stage) -> int:
        """GPUs that a stage holds at once."""
        if isinstance(stage, Reference):
            return self.recipe.reference.num_processes
        return self.recipe.warmup.num_processes if isinstance(stage, Warmup) else 1

    def hidden(self, stage: Stage) -> int:
        """Numbers of a state or embedding."""
        if isinstance(stage, Embeddings | TargetEmbeddings):
            return int(TextEncoder(stage.model, device="meta").model.config.hidden_size)
        return int(self.job.loaded.model.config.get_text_config().hidden_size)

    def targets(self, stage: TargetGradients) -> int:
        """Gradients of the target that a stage holds."""
        aim = self.job.aim(stage.shots)
        return len(aim.kept) if stage.request.per == "query" else len(aim.names)

    def kept(self, stage: Stage) -> float:
        """Bytes that a stage leaves in the run folder, records and headers of files left out."""
        recipe = self.recipe
        if isinstance(stage, Losses):
            return 16.0 * self.n
        if isinstance(stage, Dots) and recipe.gradients.store:
            dim, dtype, _ = store_inputs(self.job)
            return float(dim * self.n * (2 if dtype == "float16" else 1))
        if isinstance(stage, Dots):
            return 8.0 * (self.targets(stage.target) + 2) * self.n
        if isinstance(stage, Representations | Embeddings):
            return 4.0 * self.hidden(stage) * self.n
        if isinstance(stage, Reference):
            return self.weights if recipe.reference.full else self.adapter
        if isinstance(stage, Warmup):
            return 3 * self.adapter * math.ceil(recipe.warmup.num_train_epochs)  # with Adam's moments
        if isinstance(stage, TargetGradients):
            return self.adapter * self.targets(stage)
        if isinstance(stage, TargetRepresentations | TargetEmbeddings):
            return 4.0 * self.hidden(stage) * len(self.job.aim(stage.shots).kept)
        return 8.0 * self.n  # values by row: Shapley runs, metagradients

    def reads(self, stage: Stage) -> float:
        """Bytes of what a stage needs, tokens left out."""
        moments = 3 * self.adapter
        return sum(moments if isinstance(s, WarmupCheckpoint) else self.kept(s) for s in stage.needs(self.job))


def processor(work: Callable[[], Any]) -> float:
    """Seconds of the processor that `work` takes, so that what else runs on this machine doesn't count."""
    start = time.process_time()
    work()
    return time.process_time() - start
