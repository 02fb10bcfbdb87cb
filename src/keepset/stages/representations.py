"""Pooled hidden states of rows and target, or an embedding model's vectors of their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.model.flops import count_tokens, flops
from keepset.model.weights import fingerprint
from keepset.runfolder.shards import Arrays, Kept
from keepset.stages.losses import forward
from keepset.stages.rows import Rows
from keepset.stages.stage import VERSION, Batch, Stage, Sweep, Work
from keepset.stages.trained import weights_of

if TYPE_CHECKING:
    from keepset.features.embeddings import TextEncoder
    from keepset.features.representations import Pooling
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job


@dataclass(frozen=True)
class Representations(Sweep):
    """Pooled last hidden states of the pool's rows under the base: `state` (n, d)."""

    pooling: Pooling = "last"

    word = "representations"

    def inputs(self, job: Job) -> Any:
        return job.data_key()

    def rows(self, job: Job) -> Rows:
        return job.rows_of("chosen")

    def name(self, job: Job) -> str:
        return f"representations-{self.pooling}"

    def key(self, job: Job) -> dict[str, Any]:
        return {"version": VERSION, **job.data_key()}

    def works(self, job: Job) -> tuple[Work, ...]:
        title = self.title(job, [self])
        return (forward(job, title, job.rows, id_=self.id(job), titles=(title,), head=False),)

    @classmethod
    def title(cls, job: Job, stages: Sequence[Representations]) -> str:
        return f"representations ({stages[0].pooling})"

    @classmethod
    def spent(cls, job: Job, rows: list[Encoded], stages: Sequence[Representations]) -> tuple[int, float]:
        n_tokens, _ = count_tokens(rows)
        return n_tokens, flops(job.loaded.model, n_tokens, 0)

    @classmethod
    @contextmanager
    def opened(cls, job: Job, stages: Sequence[Representations]) -> Iterator[Batch]:
        from keepset.features.representations import representations

        (stage,), model = stages, job.loaded.model

        def batch(rows: list[Any], missing: list[Sweep]) -> dict[Sweep, Arrays]:
            states = representations(model, rows, token_budget=job.recipe.batching.token_budget, pooling=stage.pooling)
            return {stage: {"state": states}}

        yield batch


@dataclass(frozen=True)
class TargetRepresentations(Stage):
    """The same of the target's prompts + chosen answers, (m, d)."""

    pooling: Pooling = "last"
    shots: int | None = None

    word = "representations"

    def inputs(self, job: Job) -> Any:
        """The base, the template, the pool's rows (a part of the key on disk) and the target."""
        return {**job.data_key(), "target": job.aim(self.shots).target.fingerprint()}

    def works(self, job: Job) -> tuple[Work, ...]:
        aim = job.aim(self.shots)
        title = f"target representations ({self.pooling}{aim.title})"
        return (forward(job, title, aim.chosen, id_=self.id(job), titles=(title,), head=False),)

    def value(self, job: Job) -> np.ndarray:
        """(m, d), m the target's usable rows."""
        from keepset.features.representations import representations

        aim, model, budget = job.aim(self.shots), job.loaded.model, job.recipe.batching.token_budget
        return queries(
            job, self, self.kept(job),
            lambda: representations(model, aim.chosen, token_budget=budget, pooling=self.pooling),
        )  # fmt: skip

    def kept(self, job: Job) -> Kept:
        """As arrays."""
        return Kept(f"queries-{self.pooling}", {"version": VERSION, **self.inputs(job)})


def queries(job: Job, stage: Stage, kept: Kept, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The target's vectors (m, d), made once by `make` and kept."""

    def timed() -> Arrays:
        (work,) = stage.works(job)
        with job.run.timed(work.stage, rows=work.rows, tokens=work.tokens, flops=work.flops, ids=list(work.ids)):
            return {"state": make()}

    return job.run.once(kept.name, kept.key, timed)["state"]


def embedding_weights(name: str) -> list[str]:
    """Checksums of an embedding model's weights; the fingerprint of one on the hub."""
    folder = Path(name).expanduser()
    return weights_of(folder) if folder.is_dir() else [fingerprint(name)]


@dataclass(frozen=True)
class Embeddings(Sweep):
    """An embedding model's vectors of the pool's texts: `state` (n, d)."""

    model: str

    word = "representations"

    def inputs(self, job: Job) -> Any:
        return {"pool": job.pool.fingerprint(), "encoder": embedding_weights(self.model)}

    def rows(self, job: Job) -> Rows:
        return job.rows_of("texts")

    def name(self, job: Job) -> str:
        return "embeddings"

    def key(self, job: Job) -> dict[str, Any]:
        return {"version": VERSION, **self.inputs(job)}

    def works(self, job: Job) -> tuple[Work, ...]:
        return (embedding(self.title(job, [self]), self.id(job), job.texts(), self.model),)

    @classmethod
    def title(cls, job: Job, stages: Sequence[Embeddings]) -> str:
        return f"embeddings ({stages[0].model})"

    @classmethod
    def spent(cls, job: Job, rows: list[str], stages: Sequence[Embeddings]) -> tuple[int, float]:
        return embedder(job, stages[0].model).cost(rows)

    @classmethod
    @contextmanager
    def opened(cls, job: Job, stages: Sequence[Embeddings]) -> Iterator[Batch]:
        (stage,) = stages
        encoder = embedder(job, stage.model)

        def batch(rows: list[Any], missing: list[Sweep]) -> dict[Sweep, Arrays]:
            return {stage: {"state": encoder(rows, token_budget=job.recipe.batching.token_budget)}}

        yield batch


@dataclass(frozen=True)
class TargetEmbeddings(Stage):
    """The same of the target's prompts + chosen answers, (m, d)."""

    model: str
    shots: int | None = None

    word = "representations"

    def inputs(self, job: Job) -> Any:
        """The target, the embedding model's weights, and the pool (a part of the key on disk)."""
        return {
            "pool": job.pool.fingerprint(), "encoder": embedding_weights(self.model),
            "target": job.aim(self.shots).target.fingerprint(),
        }  # fmt: skip

    def works(self, job: Job) -> tuple[Work, ...]:
        aim = job.aim(self.shots)
        title = f"target embeddings ({self.model}{aim.title})"
        return (embedding(title, self.id(job), aim.texts(with_chosen=True), self.model),)

    def value(self, job: Job) -> np.ndarray:
        texts, budget = job.aim(self.shots).texts(with_chosen=True), job.recipe.batching.token_budget
        return queries(job, self, self.kept(job), lambda: embedder(job, self.model)(texts, token_budget=budget))

    def kept(self, job: Job) -> Kept:
        """As arrays."""
        return Kept("queries-embeddings", {"version": VERSION, **self.inputs(job)})


def embedder(job: Job, name: str) -> TextEncoder:
    """An embedding model, loaded once a job."""
    from keepset.features.embeddings import TextEncoder
    from keepset.model.load import pick_device

    device = pick_device(job.recipe.model.device)
    return job.once_a_recipe(("embedder", name), lambda: TextEncoder(name, device=device))


def embedding(stage: str, id_: str, texts: Sequence[str], name: str) -> Work:
    """A forward pass of an embedding model over texts."""
    from keepset.features.embeddings import TextEncoder

    n_tokens, work = TextEncoder(name, device="meta").cost(texts)
    return Work(stage, "forward", len(texts), n_tokens, work, ids=(id_,), titles=(stage,))
