"""`keepset plan --gpus`: what a recipe would take on a cluster, from counts; nothing is run and no weight is read.

Operations are those of `price.py`; reading, encoding and text methods are timed here on some rows. Shards of passes go
to all GPUs, whole shards only; trainings that hang on nothing but each other's base run side by side, each on its
`num_processes` GPUs; every worker reads the whole pool; text methods, scoring and the report are one process. Phases
follow each other, and what has to be carried is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.data.spool import IN_MEMORY
from keepset.errors import RecipeError
from keepset.methods.table import needs_model
from keepset.pipeline.bank import Bank
from keepset.pipeline.cluster import (
    GPUS,
    START,
    Cluster,
    Rates,
    Task,
    makespan,
    measured_rates,
    peak_rates,
    shard_seconds,
)
from keepset.pipeline.cluster_counts import Counts, processor
from keepset.pipeline.plan import REPORT_SHARE, text_step
from keepset.pipeline.price import final_work, together, users_of
from keepset.recipe import Recipe
from keepset.runfolder.run import Run
from keepset.stages.influence import Dots
from keepset.stages.stage import Stage, Sweep, Work

TRAINED_ROW = 6_900  # bytes that a training holds of a row of 65 tokens: `davir` over `rds` in experiments/scale
HELD = 2**31  # bytes in one process from which on a note says so
GIB = 2**30
ROOM = 0.8  # share of a GPU's memory that weights may take
ALONE = 0.1  # share of the time that trainings take from which on a note says so

Phase = Literal["start", "text", "trainings", "target", "passes", "select", "final"]


@dataclass(frozen=True)
class Step:
    """A stage on the cluster.

    Attributes:
        stage, methods, rows, tokens, flops: as in `Work`.
        phase: when it is done.
        how: who does it, for people.
        seconds: until it is done, where nothing runs beside it.
        network: bytes that pass between nodes, or between nodes and the shared disk.
        disk: bytes that it leaves in the run folder.
        kind: which rate its operations go by.
        tasks: what its phase shares out; empty: all workers, or one, are at it.
    """

    stage: str
    phase: Phase
    how: str
    seconds: float
    methods: str = "all"
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    network: float = 0.0
    disk: float = 0.0
    kind: str = ""
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class Planner:
    """Turns counts into steps on a cluster."""

    counts: Counts
    cluster: Cluster
    rates: Rates

    def steps(self) -> list[Step]:
        """All steps in the order of their phases."""
        counts, recipe = self.counts, self.counts.recipe
        texts = [text_step(counts.job, spec, processor) for spec in recipe.methods if not needs_model(spec.name)]
        select = REPORT_SHARE * counts.read_row * counts.n
        return [
            *self.beginning(),
            *(Step(t.stage, "text", "one process", t.seconds * counts.scale, t.methods, counts.n) for t in texts),
            *sorted(self.selection(), key=lambda step: ("trainings", "target", "passes").index(step.phase)),
            Step("score, select, report", "select", "one process", select, rows=counts.n),
            *self.final(),
        ]

    def seconds(self, work: Work) -> float:
        """What a work takes one GPU.

        Raises:
            RecipeError: its rate was to be measured and wasn't.
        """
        rate = self.rates.of(work.kind)
        if math.isnan(rate):
            what = {"train": "a training", "backward": "a gradient pass"}.get(work.kind, "a forward pass")
            raise RecipeError(f"--like: that run measured no {what[2:]}, which '{work.stage}' needs; score by a method "
                              f"there that has {what}")  # fmt: skip
        return work.flops / rate + (self.rates.train_seconds * work.trainings if work.kind == "train" else 0.0)

    def carried(self, reads: float, results: float, tokens: float = 0.0) -> tuple[float, float]:
        """Bytes over the network and seconds for them: `reads` reach every node, `results` the disk or the driver.

        Of the tokens each node reads its share from a shared disk; without one it is brought all of them.
        """
        nodes, shared = self.cluster.nodes, self.cluster.shared
        if nodes == 1:
            return 0.0, 0.0
        a_node = reads + (tokens / nodes if shared else tokens)
        waited = a_node + (results / nodes if shared else results)
        return nodes * a_node + results, self.cluster.carry(waited)

    def beginning(self) -> Iterator[Step]:
        """Starting every worker, reading the pool in each, encoding it together."""
        counts, cluster, n = self.counts, self.cluster, self.counts.n
        network, waited = self.carried(counts.weights, 0.0)
        yield Step("start, load the model", "start", "each worker", START + waited, network=network)
        spooled = cluster.gpus * counts.pool_bytes if counts.pool_bytes > IN_MEMORY else 0.0
        network, waited = self.carried(counts.pool_bytes + spooled if cluster.shared else 0.0, 0.0)
        yield Step("read the pool", "start", "each worker", counts.read_row * n + waited, rows=n, network=network)
        size, disk = counts.recipe.batching.shard_rows, counts.token_bytes
        network, waited = self.carried(0.0, disk)
        seconds = shard_seconds(n, counts.encode_row * n, cluster.workers, size) + waited
        yield Step("encode", "start", "shards", seconds, rows=n, tokens=counts.tokens, network=network, disk=disk)

    def selection(self) -> Iterator[Step]:
        """The model stages of all methods; works of one name are one step."""
        counts = self.counts
        users = users_of(counts.job, counts.recipe.methods)
        labels = {work: list(of.labels) for work, of in users.items()}
        order = [m.label for m in counts.recipe.methods]
        for _, group in groupby(sorted(users, key=lambda w: w.stage), key=lambda w: w.stage):
            works = list(group)
            merged = together(works, order, labels)
            stages = list(dict.fromkeys(stage for work in works for stage in users[work].stages))
            grown = {work: counts.grown(work, counts.factor(next(iter(users[work].stages)))) for work in works}
            one = counts.grown(merged, counts.factor(stages[0]))
            disk = sum(counts.kept(stage) for stage in stages)
            pooled = isinstance(stages[0], Sweep) and not (
                isinstance(stages[0], Dots) and counts.recipe.gradients.store
            )
            if pooled:
                yield self.passes(one, list(grown.values()), stages, disk)
            else:
                yield self.pieces(one, {s: [grown[w] for w in works if s in users[w].stages] for s in stages}, disk)

    def passes(self, one: Work, works: Sequence[Work], stages: Sequence[Stage], disk: float) -> Step:
        """Passes over rows, shard by shard on all GPUs."""
        counts, size = self.counts, self.counts.recipe.batching.shard_rows
        reads = sum({stage: counts.reads(stage) for stage in stages}.values())
        network, waited = self.carried(reads, disk, counts.token_bytes * len(works))
        workers, n = self.cluster.workers, counts.n  # of a pair both sides lie in one shard
        seconds = sum(shard_seconds(min(w.rows, n), self.seconds(w), workers, size) for w in works)
        return Step(one.stage, "passes", "shards", seconds + waited, one.methods, one.rows, one.tokens, one.flops,
                    network, disk, one.kind)  # fmt: skip

    def pieces(self, one: Work, works: dict[Stage, list[Work]], disk: float) -> Step:
        """What is kept as one piece each: trainings, gradients of the target; or a store, which one process fills.

        Raises:
            RecipeError: a training over more processes than a node has GPUs.
        """
        counts, train = self.counts, one.kind == "train"
        tasks = []
        network = 0.0
        for stage, own in works.items():
            held = counts.processes(stage)
            self.check(held)
            reads = counts.reads(stage) + (counts.token_bytes if train else 0.0)
            passed, waited = self.carried(0.0, counts.kept(stage), reads)
            network += passed
            start = sum(self.rates.train_seconds * work.trainings for work in own) if train else 0.0
            tasks.append(Task((sum(self.seconds(work) for work in own) - start) / held + start + waited, held))
        return self.side_by_side(one, "trainings" if train else "target", tasks, network, disk)

    def check(self, processes: int) -> None:
        """Refuse a training over more GPUs than a node has."""
        if processes > self.cluster.gpus:
            raise RecipeError(
                f"num_processes: {processes}, and a node has {self.cluster.gpus} GPUs; a training stays on one node: "
                "change --gpus or the recipe"
            )

    def side_by_side(self, one: Work, phase: Phase, tasks: Sequence[Task], network: float, disk: float) -> Step:
        """A step of tasks."""
        most = max(task.processes for task in tasks)
        how = f"{most} processes" if most > 1 else f"{len(tasks)} side by side" if len(tasks) > 1 else "one process"
        return Step(one.stage, phase, how, makespan(tasks, self.cluster.workers), one.methods, one.rows, one.tokens,
                    one.flops, network, disk, one.kind, tuple(tasks))  # fmt: skip

    def final(self) -> Iterator[Step]:
        """Final models and those of `validate`, each trained and evaluated by whoever is free."""
        counts, recipe = self.counts, self.counts.recipe
        works = [*final_work(counts.job).works, *(Bank(counts.job).works() if recipe.validation else ())]
        models = 1 + sum(work.trainings for work in works if work.kind == "train")
        self.check(recipe.train.num_processes)
        size = counts.weights if recipe.train.full else counts.adapter
        for work in works:
            grows = work.kind == "train" and work.stage.endswith(("%", "full pool"))
            one = counts.grown(work, counts.scale if grows else 1.0)
            if work.kind != "train":
                tasks = [Task(self.seconds(one) / models)] * models
                yield self.side_by_side(one, "final", tasks, 0.0, 0.0)
                continue
            network, waited = self.carried(0.0, size * work.trainings)
            held, start = recipe.train.num_processes, self.rates.train_seconds
            each = (self.seconds(one) / work.trainings - start) / held + start + waited / work.trainings
            yield self.side_by_side(one, "final", [Task(each, held)] * work.trainings, network, size * work.trainings)


def total_seconds(steps: Sequence[Step], workers: int) -> float:
    """All phases one after the other; the tasks of one phase run side by side."""
    total = sum(step.seconds for step in steps if not step.tasks)
    for phase in {step.phase for step in steps if step.tasks}:
        total += makespan([task for step in steps if step.phase == phase for task in step.tasks], workers)
    return total


def plan_cluster(
    recipe: Recipe,
    cluster: Cluster,
    *,
    rows: int | None = None,
    like: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Count every stage of a recipe and say what it takes on a cluster; the run folder isn't touched.

    Args:
        recipe: its model may be a folder with config and tokenizer alone.
        cluster: where.
        rows: as if the pool had so many rows like its own.
        like: a finished run folder whose measured rates are taken for one worker's.
        console: takes progress.

    Returns:
        JSON-ready: `cluster`, `rows`, `steps` (see `Step`), `total_seconds`, `gpu_hours` (held), `busy` (share of them
        that GPUs compute), `cost`, `network_bytes`, `disk_bytes`, `notes`.

    Raises:
        RecipeError: a kind of GPU that isn't known, a training over more of them than a node has, or no use for any.
    """
    if not any(needs_model(spec.name) for spec in recipe.methods) and not (
        recipe.evaluate.pairs or recipe.evaluate.heldout or recipe.validation
    ):
        raise RecipeError("--gpus: nothing in this recipe runs a model; plan it for this machine, without --gpus")
    rates = measured_rates(Run(like).costs(), str(like)) if like else peak_rates(cluster, recipe.model.dtype)
    counts = Counts(recipe, rows, console)
    planner = Planner(counts, cluster, rates)
    steps = planner.steps()
    total = total_seconds(steps, cluster.workers)
    hours = total * cluster.workers / 3600
    busy = sum(step.flops / rates.of(step.kind) for step in steps if step.flops)
    return {
        "cluster": asdict(cluster),
        "like": str(like) if like else None,
        "rows": counts.n,
        "steps": [{k: v for k, v in asdict(step).items() if k != "tasks"} for step in steps],
        "total_seconds": total,
        "gpu_hours": hours,
        "busy": busy / (total * cluster.workers),
        "cost": None if cluster.price is None else hours * cluster.price,
        "network_bytes": sum(step.network for step in steps),
        "disk_bytes": sum(step.disk for step in steps),
        "notes": list(notes(planner, steps, total)),
    }


def notes(planner: Planner, steps: Sequence[Step], total: float) -> Iterator[str]:
    """What more GPUs don't shorten, and what breaks first at this size."""
    counts, cluster, recipe = planner.counts, planner.cluster, planner.counts.recipe
    trained = {kind for kind, spec in (("reference", recipe.reference), ("final", recipe.train)) if spec.full}
    full = trained and any(step.kind == "train" for step in steps)
    need, gpu = counts.weights * (4 if full else 1) / GIB, GPUS.get(cluster.kind)
    if gpu and any(step.flops for step in steps) and need > ROOM * gpu.gib:
        what = "the weights, their gradients and Adam's moments" if full else "the weights"
        yield f"memory: {what} take {need:.0f} GiB, a GPU has {gpu.gib}, and each worker holds them all"
    needed = [step for step in steps if step.phase == "trainings"]
    tasks = [task for step in needed for task in step.tasks]
    alone = total_seconds(needed, cluster.workers)
    if cluster.workers > 1 and alone > ALONE * total:
        at_once = max([min(len(tasks), cluster.workers), *(task.processes for task in tasks)])
        more = f"; num_processes: {cluster.gpus} shares one among a node's" if cluster.gpus > at_once else ""
        yield (
            f"{alone / total:.0%} of the time goes to the trainings that scores need, on {at_once} of "
            f"{cluster.workers} GPUs{more}"
        )
    yield from held_notes(counts, cluster, steps)


def held_notes(counts: Counts, cluster: Cluster, steps: Sequence[Step]) -> Iterator[str]:
    """What one process or one disk holds that grows with the pool."""
    states = sum(step.disk for step in steps if step.stage.startswith(("representations", "embeddings")))
    if states > HELD:
        yield f"memory: the process that scores holds all states at once, {states / GIB:.0f} GiB"
    rows = counts.n * TRAINED_ROW
    if any(step.stage.startswith("train the reference") for step in steps) and rows > HELD:
        yield f"memory: the reference's training holds its rows, about {rows / GIB:.0f} GiB"
    if not cluster.shared and cluster.nodes > 1 and counts.token_bytes > HELD:
        yield f"memory: without a shared folder Ray's driver holds all tokens, {counts.token_bytes / GIB:.0f} GiB"
    if counts.pool_bytes > IN_MEMORY:
        copy = counts.pool_bytes / GIB
        yield f"disk: while it works each worker has a copy of the pool, {copy:.1f} GiB, in work/ or /tmp"


# -- on screen -------------------------------------------------------------------------------------------------------


def print_cluster(plan: dict[str, Any], console: Console) -> None:
    """One line a stage, the sums, and what to know."""
    cluster = Cluster(**plan["cluster"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ["stage", "for", "by", "PFLOP", "time", "network", "disk"]
    for name in columns + (["cost"] if cluster.price is not None else []):
        table.add_column(name, justify="left" if name in ("stage", "for", "by") else "right", no_wrap=name == "time")
    for s in plan["steps"]:
        cells = [s["stage"], s["methods"], s["how"], f"{s['flops'] / 1e15:,.0f}", lasting(s["seconds"])]
        cells += [size(s["network"]), size(s["disk"])]
        if cluster.price is not None:
            cells.append(f"{s['seconds'] / 3600 * cluster.workers * cluster.price:,.2f}")
        table.add_row(*cells)
    console.print(table)
    rate = f"rates of {plan['like']}" if plan["like"] else f"{cluster.utilisation:.0%} of peak: not measured"
    nodes = f"{cluster.nodes} x " if cluster.nodes > 1 else ""
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    line = (
        f"{plan['rows']:,} rows on {nodes}{cluster.gpus} {cluster.kind} ({rate}): about "
        f"{lasting(plan['total_seconds'])}, {plan['gpu_hours']:,.1f} GPU hours held, {plan['busy']:.0%} of them "
        f"computing{cost}; network {size(plan['network_bytes'])}, disk {size(plan['disk_bytes'])}"
    )
    console.print(line, highlight=False, soft_wrap=True)
    for line in plan["notes"]:
        console.print(f"note: {line}", highlight=False, soft_wrap=True)


def lasting(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n_bytes: float) -> str:
    """Bytes as MB, GB or TB; a dash for none."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.1f} {name}"
    return "< 1 MB" if n_bytes else "–"
