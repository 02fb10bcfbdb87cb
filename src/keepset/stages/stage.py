"""What a run computes, as values: a stage says what its numbers are made of, what it needs, what it costs, and does it.

Equal stages give equal numbers, so two methods that ask for equal stages share them. From the value alone follow the
files in the run folder (`Sweep.name` and `Sweep.key`), the price (`works`, what `plan` and `compare` print), the
entries in `costs.jsonl`, the keys of stored scores (`id`), and what another process needs to take part (`Pass`).
"""

from __future__ import annotations

import atexit
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console

from keepset.lazy import take
from keepset.recipe import parse_recipe
from keepset.runfolder.execute import Executor, Task
from keepset.runfolder.files import canonical, digest
from keepset.runfolder.shards import Arrays, Kept, Shards
from keepset.stages.executors import executor

if TYPE_CHECKING:
    from keepset.stages.job import Job
    from keepset.stages.rows import Rows

VERSION = 1  # of the numbers: raise it when a change of code changes them

Kind = Literal["forward", "backward", "train"]


@dataclass(frozen=True)
class Work:
    """What has to be done once: a pass, a training, or the same pass at several checkpoints.

    Counts come from the recipe and the pool alone, so they are the same before a run, after it, and after a run that
    was killed and resumed; only seconds are measured.

    Attributes:
        stage: what `plan` calls it. Works of one name are printed as one.
        kind: which of the machine's rates its time goes by.
        rows: rows it looks at.
        tokens: tokens that go through the model, passes counted.
        flops: operations.
        ids: what its entries in `costs.jsonl` are found by.
        titles: what entries without ids, of folders made before there were any, are called.
        trainings: how many trainings it starts.
        part: works of one name over other rows have another part; their rows add up.
        counted: whether the printed name says how often it is done.
        need: `gradients` of a pass over the pool, `reference` of the reference's training: what `plan` advises on.
        methods: whose it is.
    """

    stage: str
    kind: Kind
    rows: int
    tokens: int
    flops: float
    ids: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    trainings: int = 1
    part: str = ""
    counted: bool = False
    need: str = ""
    methods: str = ""

    def logged(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of `costs.jsonl` is of this work."""
        if "ids" in entry:
            return not set(self.ids).isdisjoint(entry["ids"])
        return entry["stage"] in self.titles


class Stage(ABC):
    """A frozen dataclass of values; its fields, with the recipe and the data, determine its numbers."""

    word: ClassVar[str]
    """What a method that has it `needs`, in the table of methods."""

    def needs(self, job: Job) -> tuple[Stage, ...]:
        """The stages whose results it reads."""
        return ()

    @abstractmethod
    def inputs(self, job: Job) -> Any:
        """JSON of what its numbers depend on beside its fields and its needs: data, models and settings of the recipe.

        Weights that the run trains are named by what they are trained from, so that nothing has to be trained for it.
        """

    def works(self, job: Job) -> tuple[Work, ...]:
        """Its price, without that of its needs."""
        return ()

    @abstractmethod
    def value(self, job: Job) -> Any:
        """Its result: read from the run folder, or computed and kept there."""

    def kept(self, job: Job) -> Kept | None:
        """Where its result lies as one piece; None: nowhere, or shard by shard. Asked when what it needs is there."""
        return None

    def id(self, job: Job) -> str:
        """Hash (16 hex digits) of everything that its numbers depend on."""
        return job.once_a_recipe(
            (self, "id"),
            lambda: digest([repr(self), self.inputs(job), [stage.id(job) for stage in self.needs(job)]])[:16],
        )


def closure(job: Job, stages: Iterable[Stage]) -> list[Stage]:
    """The stages with all that they need, each once, after its needs."""
    ordered: dict[Stage, None] = {}
    for stage in stages:
        ordered |= dict.fromkeys((*closure(job, stage.needs(job)), stage))
    return list(ordered)


# -- passes over rows ---------------------------------------------------------------------------------------------

Batch = Callable[[list[Any], list["Sweep"]], dict["Sweep", Arrays]]
"""Takes a shard's rows and the stages that lack it; returns each stage's columns (m, ...)."""


class Sweep(Stage):
    """A stage with one entry a row, computed and kept shard by shard."""

    @abstractmethod
    def name(self, job: Job) -> str:
        """Its folder in `work/`."""

    @abstractmethod
    def key(self, job: Job) -> dict[str, Any]:
        """Everything its numbers depend on, with the weights of trained models; another key is another subfolder."""

    @abstractmethod
    def rows(self, job: Job) -> Rows:
        """What it looks at."""

    def together(self, job: Job) -> Any:
        """Stages of one class for which this is equal can be computed in one pass."""
        return self

    @classmethod
    @abstractmethod
    def opened(cls, job: Job, stages: Sequence[Any]) -> AbstractContextManager[Batch]:
        """Have ready what a pass for these stages needs: models, adapters, targets."""

    @classmethod
    @abstractmethod
    def title(cls, job: Job, stages: Sequence[Any]) -> str:
        """What the pass is called on screen and in `costs.jsonl`."""

    @classmethod
    @abstractmethod
    def spent(cls, job: Job, rows: list[Any], stages: Sequence[Any]) -> tuple[int, float]:
        """Tokens and operations that a shard took."""

    def value(self, job: Job) -> Arrays:
        return fetch(job, [self])[self]

    @classmethod
    def compute(cls, job: Job, stages: Sequence[Any]) -> dict[Sweep, Arrays]:
        """The columns of stages that belong together, over all rows; what is missing is computed."""
        return sweep(job, stages)


def fetch(job: Job, stages: Sequence[Sweep], beside: Iterable[Stage] = ()) -> dict[Sweep, Arrays]:
    """Columns of some sweeps over all rows; what is missing is computed, in as few passes as can be.

    Stages of `beside` are computed in the same pass where they can be, and stay on disk for their turn.
    """
    arrays: dict[Sweep, Arrays] = {}
    for stage in stages:
        if stage not in arrays:
            together = stage.together(job)
            several = [s for s in (*beside, *stages) if type(s) is type(stage) and s.together(job) == together]
            arrays |= type(stage).compute(job, list(dict.fromkeys(several)))
    return arrays


def sweep(job: Job, stages: Sequence[Sweep]) -> dict[Sweep, Arrays]:
    """The columns of some stages; what is missing is computed in one pass."""
    names = {stage.name(job): stage for stage in stages}
    return {names[name]: columns for name, columns in complete(job, stages).gather().items()}


def complete(job: Job, stages: Sequence[Sweep]) -> Shards:
    """Compute what is missing of some stages in one pass, shard by shard, with its progress and its costs.

    Raises:
        Busy: another worker is at it, and this one doesn't wait.
    """
    who = executor(job)
    if not who.here:
        make_needs(job, stages, who)
    own = Pass(recipe_of(job), tuple(stages))
    shards, kind, rows = own.shards(job), type(stages[0]), stages[0].rows(job)
    lacking = {number: own.lacking(job, shards, number) for number in range(len(shards.parts))}
    numbers = [number for number, names in lacking.items() if names]
    if not numbers:
        return shards
    used = [stage for stage in stages if any(stage in lacking[n] for n in numbers)]
    title = kind.title(job, used)
    ids = sorted({i for stage in used for work in stage.works(job) for i in work.ids})
    kept = [] if who.here else [kept.folder for s in closure(job, stages) if (kept := s.kept(job))]
    reads = () if who.here else (*job.reads, *kept)
    task = Task(make_shards, own, digest(shards.stages)[:16], reads)
    opened = own.opened(job, used, shards) if who.here else nullcontext()
    with opened, job.run.timed(title, ids=ids) as entry:
        entry.update(tokens=0, flops=0.0, rows=0, skip=job.worker)  # whoever leads counts
        there = len(rows.ids) - sum(len(shards.parts[n]) for n in numbers)
        with job.tracked(title, len(rows.ids), there=there) as advance:

            def committed(number: int) -> None:
                part = take(rows.tokens, shards.parts[number])
                tokens, work = kind.spent(job, part, lacking[number])
                entry.update(
                    rows=entry["rows"] + len(part), tokens=entry["tokens"] + tokens, flops=entry["flops"] + work
                )
                job.run.meter.note()
                advance(len(part))

            who.run(task, numbers, is_there=lambda n: not shards.missing(n), advance=committed)
    return shards


def recipe_of(job: Job) -> str:
    """What a task tells another process of the job: the recipe with its run folder, as canonical JSON."""
    return canonical(job.recipe.model_dump(mode="json"))


@dataclass(frozen=True)
class Pass:
    """Stages that are computed in one pass over the same rows: what an executor is handed. It can be pickled.

    `recipe` is canonical JSON with the run folder; a process that hasn't opened the pass builds the job from it.
    """

    recipe: str
    stages: tuple[Sweep, ...]

    def shards(self, job: Job) -> Shards:
        """The shards of its stages."""
        keys = {stage.name(job): stage.key(job) for stage in self.stages}
        return job.run.shards(keys, self.stages[0].rows(job).ids, job.recipe.batching.shard_rows)

    def lacking(self, job: Job, shards: Shards, number: int) -> list[Sweep]:
        """The stages that lack a shard."""
        missing = shards.missing(number)
        return [stage for stage in self.stages if stage.name(job) in missing]

    @contextmanager
    def opened(self, job: Job, stages: Sequence[Sweep], shards: Shards) -> Iterator[None]:
        """Have its models ready in this process, and in forks of it, while the context lasts."""
        with type(stages[0]).opened(job, stages) as batch:
            OPEN[self] = (job, shards, batch)
            try:
                yield
            finally:
                del OPEN[self]


OPEN: dict[Pass, tuple[Job, Shards, Batch]] = {}
"""The passes that this process has opened; forks inherit them."""

JOBS: dict[str, Job] = {}
"""The job of this process, by its recipe, where it takes part in another's run."""

HELD = ExitStack()
"""Keeps the last pass open in a process that is handed shards one by one."""
atexit.register(HELD.close)  # while threads can still be started


def job_of(recipe: str) -> Job:
    """This process's job for a recipe of `recipe_of`; the pass that it kept open is closed."""
    HELD.close()
    if recipe not in JOBS:
        from keepset.stages.job import Job

        JOBS.clear()
        JOBS[recipe] = Job(parse_recipe(json.loads(recipe), stored=True), console=Console(quiet=True), worker=True)
    return JOBS[recipe]


def make_shards(own: Pass, numbers: Sequence[int]) -> None:
    """Compute and commit shards of a pass, in whatever process: the function that executors are handed."""
    if own not in OPEN:
        job = job_of(own.recipe)
        HELD.enter_context(own.opened(job, own.stages, own.shards(job)))
    job, shards, batch = OPEN[own]
    rows = own.stages[0].rows(job)
    for number in numbers:
        stages = own.lacking(job, shards, number)
        if stages:
            arrays = batch(take(rows.tokens, shards.parts[number]), stages)
            shards.write(number, {stage.name(job): columns for stage, columns in arrays.items()})
        if job.worker:
            shards.read[number].clear()  # whoever leads reads them all


# -- what is kept as one piece, made by an executor -----------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """Stages whose results are kept as one piece, each a task of its own: trainings, gradients of the target."""

    recipe: str
    stages: tuple[Stage, ...]


def make_values(own: Values, numbers: Sequence[int]) -> None:
    """Have some stages' results kept in the run folder, in whatever process."""
    job = job_of(own.recipe)
    for number in numbers:
        own.stages[number].value(job)


def make_needs(job: Job, stages: Iterable[Stage], who: Executor) -> None:
    """Have all that is kept as one piece made by an executor, what is ready at the same time together."""
    order = closure(job, stages)
    while True:
        there: dict[Stage, bool] = {}
        ready: list[Stage] = []
        for stage in order:
            possible = all(there[need] for need in stage.needs(job))
            kept = stage.kept(job) if possible else None
            there[stage] = possible and (kept is None or job.run.has(kept))
            if possible and not there[stage]:
                ready.append(stage)
        if not ready:
            return
        own = Values(recipe_of(job), tuple(ready))
        reads = (*job.reads, *(kept.folder for s in order if there[s] and (kept := s.kept(job))))
        task = Task(make_values, own, digest([stage.id(job) for stage in ready])[:16], reads)

        def is_there(number: int, ready: list[Stage] = ready) -> bool:
            kept = ready[number].kept(job)
            return kept is None or job.run.has(kept)

        job.say(f"{len(ready)} trainings and gradients of the target are made by workers")
        who.run(task, list(range(len(ready))), is_there=is_there, advance=lambda n: None)
        job.run.meter.collect()
