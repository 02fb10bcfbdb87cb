"""`keepset plan`: what a recipe would cost on this machine, from counts and a short probe, before anything is spent.

Every stage's operations are counted (see `counts.py`); the probe measures how many operations a second this machine
does forward, and forward + backward, on rows of this very pool. Seconds = operations / measured rate. Times on named
GPUs come from their peak rate at a stated utilisation: an estimate, not a measurement.
"""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.cost import count_tokens, flops
from keepset.counts import Work, final_work, selection_work
from keepset.job import Job
from keepset.recipe import Recipe

PROBE_ROWS = 24
GPUS = {"RTX 4090": 165e12, "A100 80GB": 312e12, "H100 SXM": 989e12}  # dense bf16 operations a second, vendors' figures
UTILISATION = 0.35


@dataclass(frozen=True)
class Step:
    """One stage: its rows, tokens, operations, and seconds here."""

    stage: str
    methods: str
    rows: int
    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Operations a second of this machine on this pool's rows."""

    forward: float
    backward: float
    load_seconds: float


def probe(job: Job) -> Rates:
    """Time a forward, and a forward + backward pass over a few rows spread over the pool's lengths."""
    from keepset.features.losses import row_losses
    from keepset.features.targets import target_vectors
    from keepset.model import apply_lora

    start = time.perf_counter()
    model = job.loaded.model
    load_seconds = time.perf_counter() - start
    order = np.argsort([len(r.input_ids) for r in job.rows], kind="stable")
    picked = order[np.linspace(0, len(order) - 1, min(PROBE_ROWS, len(order))).round().astype(int)]
    rows = [job.rows[i] for i in np.unique(picked)]
    budget = job.recipe.batching.token_budget
    row_losses(model, rows[:4], token_budget=budget)  # warm up
    work = flops(model, *count_tokens(rows))
    start = time.perf_counter()
    row_losses(model, rows, token_budget=budget)
    forward = work / (time.perf_counter() - start)
    adapted = apply_lora(model, job.recipe.lora, job.recipe.seed)
    start = time.perf_counter()
    tasks = np.zeros(len(rows), dtype=np.int64)
    target_vectors(adapted, [(r, None) for r in rows], tasks, loss="sft", reference="none", token_budget=budget)
    backward = 2 * work / (time.perf_counter() - start)
    adapted.unload()
    return Rates(forward, backward, load_seconds)


def plan_recipe(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Count and time every stage of a recipe.

    Args:
        recipe: the recipe; its run folder is created, nothing is trained or scored.
        console: where progress goes.

    Returns:
        JSON-ready: `steps` (stage, methods, rows, tokens, flops, seconds), `total_seconds`, `peak_gib` (of the probe),
        `disk_mib` (adapters, scores and shards), `gpus` (name -> seconds, estimates), `cheaper` (advice with figures).
    """
    job = Job(recipe, console=console)
    rates = probe(job)
    steps = [priced(w, rates) for w in [*selection_work(job, recipe.methods), *final_work(job)]]
    total = sum(step.seconds for step in steps)
    work = sum(step.flops for step in steps)
    return {
        "steps": [asdict(step) for step in steps],
        "total_seconds": round(total, 1),
        "total_flops": work,
        "rates_gflops": {"forward": round(rates.forward / 1e9, 1), "backward": round(rates.backward / 1e9, 1)},
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "disk_mib": round(disk_bytes(job, steps) / 2**20, 1),
        "gpus": {name: round(work / (peak * UTILISATION), 1) for name, peak in GPUS.items()},
        "utilisation": UTILISATION,
        "cheaper": cheaper(job, steps),
    }


def priced(work: Work, rates: Rates) -> Step:
    """A stage with its seconds here: loading the model adds to every training."""
    seconds = work.flops / (rates.forward if work.kind == "forward" else rates.backward)
    seconds += rates.load_seconds if work.kind == "train" else 0.0
    return Step(work.stage, work.methods, work.rows, work.tokens, work.flops, seconds)


def disk_bytes(job: Job, steps: list[Step]) -> float:
    """Adapters (or full models), scores and shards."""
    lora = sum(2 * job.recipe.lora.lora_r * 2 * job.loaded.model.config.hidden_size for _ in range(4))
    adapter = 4 * lora * job.loaded.model.config.num_hidden_layers
    models = sum(1 for s in steps if s.stage.startswith(("train", "warm-up"))) * (len(job.recipe.methods) + 4)
    return float(adapter * models + len(job.rows) * 200 * (len(job.recipe.methods) + 4))


def cheaper(job: Job, steps: list[Step]) -> list[str]:
    """What would cut the bill, with the seconds it would save."""
    found = []
    gradients = sum(s.seconds for s in steps if s.stage.startswith("gradients"))
    spec = job.recipe.warmup
    if gradients and spec.checkpoints == "all" and spec.num_train_epochs > 1:
        share = 1 - 1 / np.ceil(spec.num_train_epochs)
        found.append(
            f"warmup.checkpoints: last saves {gradients * share:.0f} s: scores at one checkpoint instead of all"
        )
    maps = [s for s in steps if s.stage.startswith("gradients")]
    if len(maps) > 1:
        found.append(
            f"one map instead of {len(maps)} saves {sum(s.seconds for s in maps[1:]):.0f} s: a pass over the pool each"
        )
    reference = sum(s.seconds for s in steps if s.stage == "train the reference")
    if reference and job.recipe.reference.num_train_epochs > 1:
        found.append(
            f"reference.num_train_epochs: 1 saves {reference * (1 - 1 / job.recipe.reference.num_train_epochs):.0f} s"
        )
    if gradients and not any(m.name in ("bm25", "dsir") for m in job.recipe.methods):
        found.append("bm25 and dsir look at the same target and cost seconds: worth a row in the table")
    return found


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the plan as a table."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "for", "rows", "tokens", "TFLOP", "seconds"):
        table.add_column(name, justify="left" if name in ("stage", "for") else "right")
    for s in plan["steps"]:
        table.add_row(
            s["stage"],
            s["methods"],
            str(s["rows"]),
            str(s["tokens"]),
            f"{s['flops'] / 1e12:.1f}",
            f"{s['seconds']:.0f}",
        )
    console.print(table)
    rates = plan["rates_gflops"]
    console.print(
        f"in all about {plan['total_seconds']:.0f} s here (probe: {rates['forward']:.0f} GFLOP/s forward, "
        f"{rates['backward']:.0f} with backward), peak memory about {plan['peak_gib']:.1f} GiB, disk about "
        f"{plan['disk_mib']:.0f} MiB",
        highlight=False,
    )
    gpus = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in plan["gpus"].items())
    console.print(f"estimate, not measured: at {plan['utilisation']:.0%} of peak: {gpus}", highlight=False)
    for line in plan["cheaper"]:
        console.print(f"cheaper: {line}", highlight=False)
