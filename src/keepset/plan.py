"""`keepset plan`: what a recipe would cost on this machine, from counts and a short probe, before anything is spent.

Every stage's operations are counted (see `cost.py`); the probe measures how many operations a second this machine
does forward, and forward + backward, on rows of this very pool. Seconds = operations / measured rate. Times on named
GPUs come from their peak rate at a stated utilisation: an estimate, not a measurement.
"""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.cost import flops
from keepset.job import Job
from keepset.recipe import Recipe, TrainSpec, parse_budget
from keepset.scoring import METHODS, influence_request
from keepset.stages import count_tokens

if TYPE_CHECKING:
    from keepset.encoding import Encoded

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
    steps = selection_steps(job, rates) + final_steps(job, rates)
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


def training(job: Job, rates: Rates, stage: str, methods: str, rows: list[Encoded], args: TrainSpec) -> Step:
    """A fine-tuning of `rows`."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head, passes=3 if args.full else 2) * args.num_train_epochs
    seconds = work / rates.backward + rates.load_seconds
    return Step(stage, methods, len(rows), int(n_tokens * args.num_train_epochs), work, seconds)


def forward(job: Job, rates: Rates, stage: str, methods: str, rows: list[Encoded], times: int = 1) -> Step:
    """`times` forward passes over `rows`."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head, passes=times)
    return Step(stage, methods, len(rows), n_tokens * times, work, work / rates.forward)


def selection_steps(job: Job, rates: Rates) -> list[Step]:
    """The stages that the recipe's methods share or need alone."""
    recipe, steps = job.recipe, []
    by_need = {need: ", ".join(m.label for m in recipe.methods if need in METHODS[m.name].needs)
               for need in ("losses", "reference", "warmup", "gradients", "representations")}  # fmt: skip
    if by_need["losses"]:
        steps.append(forward(job, rates, "losses under the base", by_need["losses"], job.rows))
    if by_need["reference"] and not recipe.reference.path:
        folds = recipe.reference.folds
        for k in range(max(1, folds)):
            rows = [r for i, r in enumerate(job.rows) if not folds or i % folds != k]
            steps.append(training(job, rates, "train the reference", by_need["reference"], rows, recipe.reference))
    if by_need["reference"]:
        steps.append(forward(job, rates, "losses under the reference", by_need["reference"], job.rows))
    if by_need["gradients"] or by_need["warmup"]:
        from keepset.train.warmup import pick_subset

        picked = pick_subset(job.ids, recipe.warmup.fraction, recipe.seed, min_rows=recipe.warmup.min_rows)
        names = by_need["gradients"] or by_need["warmup"]
        steps.append(training(job, rates, "warm-up", names, [job.rows[i] for i in picked], recipe.warmup))
    if by_need["gradients"]:
        steps += gradient_steps(job, rates)
    if by_need["representations"]:
        steps.append(forward(job, rates, "representations", by_need["representations"], job.rows))
    return steps


def gradient_steps(job: Job, rates: Rates) -> list[Step]:
    """One pass over the pool for each map and checkpoint, and the target's gradients."""
    recipe = job.recipe
    spec = recipe.warmup
    checkpoints = int(np.ceil(spec.num_train_epochs)) if spec.checkpoints == "all" else 1
    users = [m for m in recipe.methods if "gradients" in METHODS[m.name].needs]
    requests = {m.label: influence_request(m.name, m.options) for m in users}
    n_tokens, n_head = count_tokens(job.rows)
    sides = [side for pair in job.target_pairs[0] for side in pair if side is not None]
    target_tokens, target_head = count_tokens(sides)
    steps = []
    for map_ in dict.fromkeys(r.map for r in requests.values()):
        labels = ", ".join(label for label, r in requests.items() if r.map == map_)
        work = flops(job.loaded.model, n_tokens, n_head, passes=2) * checkpoints
        steps.append(Step(f"gradients ({map_}) x{checkpoints}", labels, len(job.rows), n_tokens * checkpoints, work,
                          work / rates.backward))  # fmt: skip
        distinct = len({r for r in requests.values() if r.map == map_})
        work = flops(job.loaded.model, target_tokens, target_head, passes=2) * checkpoints * distinct
        tokens = target_tokens * checkpoints * distinct
        steps.append(Step(f"target gradients ({map_})", labels, len(sides), tokens, work, work / rates.backward))
    return steps


def final_steps(job: Job, rates: Rates) -> list[Step]:
    """Training and evaluating a model for every subset and seed."""
    from keepset.finals import Learner

    recipe = job.recipe
    learner = Learner(job)
    sides: list[Encoded] = [side for pair in learner.eval_pairs[0] for side in pair] if learner.eval_pairs else []
    sides += learner.eval_rows[0] if learner.eval_rows else []
    if not sides:
        return []
    lengths = np.array([len(r.input_ids) for r in job.rows])
    steps, models = [], 1
    for budget in recipe.budget:
        unit, amount = parse_budget(budget, len(job.rows), int(job.n_tokens().sum()))
        n_rows = min(len(job.rows), amount if unit == "rows" else max(1, int(amount / job.n_tokens().mean())))
        middle = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[:n_rows]
        longest = np.argsort(-job.n_tokens(), kind="stable")[:n_rows]
        count = (len(recipe.methods) + len(recipe.mix)) * len(recipe.train_seeds) + len(recipe.controls.random_seeds)
        one = training(job, rates, "", "", [job.rows[i] for i in middle], recipe.train)
        steps.append(scaled(one, count, f"train {count} models on {budget}", "methods, random"))
        models += count
        if recipe.controls.longest:
            rows = [job.rows[i] for i in longest]
            steps.append(training(job, rates, f"train on the longest {budget}", "longest", rows, recipe.train))
            models += 1
    if recipe.controls.full:
        steps.append(training(job, rates, "train on the full pool", "full", job.rows, recipe.train))
        models += 1
    one = forward(job, rates, "", "", sides)
    return [*steps, scaled(one, models, f"evaluate {models} models", "all")]


def scaled(step: Step, times: int, stage: str, methods: str) -> Step:
    """A step done several times."""
    return Step(stage, methods, step.rows * times, step.tokens * times, step.flops * times, step.seconds * times)


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
