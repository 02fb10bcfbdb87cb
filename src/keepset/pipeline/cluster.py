"""A cluster as `keepset plan` sees it: its GPUs' rates, and how long work takes that its workers share.

A GPU does its peak × a stated utilisation of operations a second, or what a finished run folder measured. What is
shared out and what isn't follows docs/clusters.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from keepset.errors import RecipeError, did_you_mean

START = 10.0  # seconds until a process has imported torch and transformers; the weights' way comes on top


@dataclass(frozen=True)
class Gpu:
    """Dense operations a second in bfloat16 and in float32 (no TF32), and GiB of memory: the vendors' figures."""

    bfloat16: float
    float32: float
    gib: int


GPUS = {
    "rtx4090": Gpu(165e12, 83e12, 24),
    "l40s": Gpu(362e12, 92e12, 48),
    "a100": Gpu(312e12, 19.5e12, 80),
    "h100": Gpu(989e12, 67e12, 80),
    "h200": Gpu(989e12, 67e12, 141),
}


@dataclass(frozen=True)
class Cluster:
    """Where a plan is for.

    Attributes:
        kind: of GPU, a key of `GPUS`; any name where rates are measured.
        gpus: of each node.
        nodes: how many.
        price: of a GPU for an hour, in any currency; None: not said.
        network: of each node, Gbit/s.
        shared: all nodes see the run folder; else Ray brings files to each node, and results back.
        utilisation: share of its peak that a GPU does.
    """

    kind: str
    gpus: int = 1
    nodes: int = 1
    price: float | None = None
    network: float = 10.0
    shared: bool = True
    utilisation: float = 0.35

    @property
    def workers(self) -> int:
        """Processes, one a GPU."""
        return self.gpus * self.nodes

    def carry(self, n_bytes: float) -> float:
        """Seconds that bytes take over one node's link."""
        return 8 * n_bytes / (self.network * 1e9)


def parse_gpus(text: str) -> tuple[str, int]:
    """`h100:8` -> kind and number a node, as Slurm and SkyPilot write it.

    Raises:
        RecipeError: it isn't of that form.
    """
    found = re.fullmatch(r"([A-Za-z][\w.-]*)(?::([1-9]\d*))?", text)
    if not found:
        raise RecipeError(f"--gpus '{text[:40]}': write KIND:NUMBER a node, as in h100:8")
    return found[1].lower(), int(found[2] or 1)


@dataclass(frozen=True)
class Task:
    """Something that is done once: seconds on `processes` GPUs, which it holds for itself."""

    seconds: float
    processes: int = 1


def makespan(tasks: Iterable[Task], workers: int) -> float:
    """Seconds until all are done: the longest first, each by the worker that is free first.

    Those of several processes are `keepset run`'s own: one after the other, before the rest.
    """
    tasks = sorted(tasks, key=lambda task: -task.seconds)
    free = np.zeros(workers)
    for task in tasks:
        if task.processes == 1:
            free[free.argmin()] += task.seconds
    return float(free.max()) + sum(task.seconds for task in tasks if task.processes > 1)


def shard_seconds(rows: int, seconds: float, workers: int, shard_rows: int | None) -> float:
    """Seconds of a pass that takes one worker `seconds`: whole shards, as `plan_shards` cuts them."""
    shards = math.ceil(rows / (shard_rows or min(2048, max(32, rows // 200))))
    return math.ceil(shards / workers) * seconds / shards if shards else 0.0


@dataclass(frozen=True)
class Rates:
    """Operations a second of one process, and what a training costs before its first step; NaN: not known."""

    forward: float
    backward: float
    train: float
    train_seconds: float

    def of(self, kind: str) -> float:
        """The rate of a kind of work."""
        return {"forward": self.forward, "backward": self.backward, "train": self.train}[kind]


def peak_rates(cluster: Cluster, dtype: str) -> Rates:
    """A GPU's peak for a dtype at the stated utilisation.

    Raises:
        RecipeError: the kind isn't known.
    """
    gpu = GPUS.get(cluster.kind)
    if gpu is None:
        hint = did_you_mean(cluster.kind, list(GPUS))
        raise RecipeError(
            f"--gpus {cluster.kind}: known are {', '.join(GPUS)}{hint}; of others name a run folder: --like RUN"
        )
    rate = (gpu.float32 if dtype == "float32" else gpu.bfloat16) * cluster.utilisation
    return Rates(rate, rate, rate, START)


PASSES = (
    ("train", ("train ",)), ("backward", ("gradients at ", "curvature at ")),
    ("forward", ("losses ", "representations ", "error norms ")),
)  # fmt: skip


def measured_rates(entries: Iterable[dict[str, Any]], source: str) -> Rates:
    """Operations a second of one process, by what `costs.jsonl` of a finished run says; a kind without entries: NaN.

    A training's start is in its entry, so it lowers the rate and isn't added again.

    Raises:
        RecipeError: no entry has operations.
    """
    sums: dict[str, tuple[float, float]] = {}
    for entry in entries:
        for kind, begins in PASSES:
            if entry.get("flops") and entry["stage"].startswith(begins):
                flops, seconds = sums.get(kind, (0.0, 0.0))
                sums[kind] = flops + entry["flops"], seconds + entry["seconds"]
    if not sums:
        raise RecipeError(f"--like {source}: its costs.jsonl has no pass and no training of a model")
    rates = {kind: flops / max(seconds, 1e-9) for kind, (flops, seconds) in sums.items()}
    forward, backward, train = (rates.get(kind, math.nan) for kind in ("forward", "backward", "train"))
    return Rates(forward, backward, train, 0.0)
