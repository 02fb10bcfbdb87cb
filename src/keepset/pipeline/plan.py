"""`keepset plan`: what a recipe would cost on this machine, from counts and a short probe, before anything is spent.

Every model stage's operations are counted (see `price.py`); the probe measures how many operations a second this
machine does forward, forward + backward and in training, on rows of this very pool. Seconds = operations / measured
rate. What has no operations to count is done and timed: imports, loading, reading and tokenising the pool, a text
method on some of the rows, starting a trainer. How far off the sum is: docs/seeing.md. Times on named GPUs come from
their peak rate at a stated utilisation: an estimate, not a measurement.
"""

from __future__ import annotations

import importlib
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.evaluate.statistics import accuracy_power, bootstrap_ci
from keepset.lazy import take
from keepset.methods.table import method_of, needs_model
from keepset.model.flops import count_tokens, flops
from keepset.pipeline.bank import Bank
from keepset.pipeline.cluster import Rates
from keepset.pipeline.learn import Learner
from keepset.pipeline.power import print_power, what_can_be_seen
from keepset.pipeline.price import Final, final_work, selection_work
from keepset.pipeline.score import text_features
from keepset.recipe import MethodSpec, Recipe
from keepset.runfolder import layout
from keepset.runfolder.files import json_text, write_atomic
from keepset.stages.job import Job
from keepset.stages.stage import Work

PROBE_ROWS = {"forward": 24, "backward": 12, "train": 8}
TEXT_ROWS = 2_000
BOOTSTRAPS = 60  # intervals and tests that evaluating and comparing one model takes (its metrics, twice, and tables)
REPORT_SHARE = 1.2  # selecting and writing the report over reading and tokenising, both by the row
GPUS = {"RTX 4090": 165e12, "A100 80GB": 312e12, "H100 SXM": 989e12}  # dense bf16 operations a second, vendors' figures
UTILISATION = 0.35


@dataclass(frozen=True)
class Step:
    """One stage: its rows, tokens, operations, and seconds here; `kind` and `need` as of `Work`."""

    stage: str
    methods: str
    rows: int
    tokens: int
    flops: float
    seconds: float
    kind: str = ""
    need: str = ""


def clock(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def probe(job: Job, kinds: set[str]) -> Rates:
    """Time what the recipe needs of: a forward pass, forward + backward, and a training of one or two steps.

    Rows are spread over the pool's lengths.
    """
    from keepset.features.influence import influence
    from keepset.features.losses import row_losses
    from keepset.features.targets import target_vectors
    from keepset.model.load import apply_lora
    from keepset.train.sft import train_sft
    from keepset.train.training import Training

    model, budget = job.loaded.model, job.recipe.batching.token_budget
    order = np.argsort(job.encoded.counts()[0][:, 0], kind="stable")

    def spread(kind: str) -> list[Any]:
        places = np.linspace(0, len(order) - 1, min(PROBE_ROWS[kind], len(order)) + 2)[1:-1].round().astype(int)
        return take(job.rows, np.unique(order[places]))

    rows = spread("forward")
    row_losses(model, rows[:2], token_budget=budget)  # warm up
    forward = flops(model, *count_tokens(rows)) / clock(lambda: row_losses(model, rows, token_budget=budget))
    backward = train = forward
    overhead = 0.0
    if "backward" in kinds:
        rows = spread("backward")
        adapted = apply_lora(model, job.recipe.lora, job.recipe.seed)
        tasks = np.zeros(2, dtype=np.int64)
        vectors = target_vectors(
            adapted, [(r, None) for r in rows[:2]], tasks, loss="sft", reference="none", token_budget=budget
        )
        seconds = clock(lambda: influence(adapted, rows, vectors, map="sgd", token_budget=budget))
        backward = flops(model, *count_tokens(rows), passes=2) / seconds
        adapted.unload()
    if "train" in kinds:
        importlib.import_module("trl")
        args, rows = job.recipe.train.model_copy(update={"num_train_epochs": 1}), spread("train")
        work = flops(model, *count_tokens(rows), passes=3 if args.full else 2)
        del model
        job.release()  # as a run does
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            trained = train_sft(Training(job.recipe.model, job.recipe.lora, args), rows, Path(folder) / "probe")
            overhead = time.perf_counter() - start - trained.seconds
        train = work / trained.seconds
    return Rates(forward, backward, train, overhead)


def plan_recipe(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Count and time every stage of a recipe.

    The run folder is created; nothing is trained or scored in it.

    Returns:
        JSON-ready: `steps` (stage, methods, rows, tokens, flops, seconds), `total_seconds`, `peak_gib` (of the probe),
        `disk_mib` (adapters, scores and shards), `gpus` (name -> seconds, estimates), `cheaper` (advice with figures),
        `heldout_pairs`, `accuracy_seen`: what `accuracy_power` says of them, and `power`: `Shown` of each measure.
    """
    job = Job(recipe, console=console)
    start = clock(lambda: job.encoder)
    read = clock(lambda: job.tokens)
    load = clock(lambda: job.loaded)
    final = final_work(job)
    counted = [*selection_work(job, recipe.methods), *final.works, *(Bank(job).works() if recipe.validation else ())]
    kinds = {str(work.kind) for work in counted}
    if "train" in kinds:
        start += clock(lambda: [importlib.import_module(name) for name in ("datasets", "peft", "trl")])
    rates = probe(job, kinds) if counted else None
    pairs = heldout_pairs(job)
    n, n_tokens = len(job.rows), int(job.encoded.counts()[0].sum())
    steps = [
        Step("start, load the model", "all", 0, 0, 0.0, start + load),
        Step("read and tokenise", "all", n, n_tokens, 0.0, read),
        *(text_step(job, spec) for spec in recipe.methods if not needs_model(spec.name)),
        *(priced(work, rates) for work in counted if rates is not None),
        Step("select, compare, report", "all", n, 0, 0.0, REPORT_SHARE * read + comparing(job, final, pairs)),
    ]
    total = sum(step.seconds for step in steps)
    work = sum(step.flops for step in steps)
    gigaflops = {k: round(getattr(rates, k) / 1e9, 1) for k in ("forward", "backward", "train") if rates is not None}
    facts = {"total_seconds": round(total, 1), "total_flops": work}
    write_atomic(job.run.path / layout.PLAN, json_text(facts).encode())  # what `keepset status` holds the price against
    return {
        **facts,
        "steps": [asdict(step) for step in steps],
        "rates_gflops": gigaflops,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "disk_mib": round(disk_bytes(job, steps) / 2**20, 1),
        "gpus": {name: round(work / (peak * UTILISATION), 1) for name, peak in GPUS.items()},
        "utilisation": UTILISATION,
        "cheaper": cheaper(job, steps),
        "heldout_pairs": pairs,
        "accuracy_seen": accuracy_power(pairs),
        "power": [asdict(one) for one in what_can_be_seen(job, Learner(job))],
    }


def plan_validation(job: Job) -> list[Step]:
    """What `keepset validate` would cost here: every training and measurement, those that are done included."""
    works = list(Bank(job).works())
    rates = probe(job, {str(work.kind) for work in works})
    return [priced(work, rates) for work in works]


def text_step(job: Job, spec: MethodSpec, timer: Callable[[Callable[[], Any]], float] = clock) -> Step:
    """A text method, timed by `timer` on some of the rows and scaled to all."""
    n = len(job.ids)
    method, n_timed = method_of(spec), min(n, TEXT_ROWS)
    method.score(text_features(job, np.arange(min(n, 20))))  # imports
    seconds = timer(lambda: method.score(text_features(job, np.arange(n_timed))))
    return Step(f"score by {spec.name}", spec.label, n, 0, 0.0, seconds * n / max(1, n_timed))


def heldout_pairs(job: Job) -> int:
    """Usable held-out pairs."""
    pairs = Learner(job).eval_pairs
    return len(pairs[0]) if pairs else 0


def comparing(job: Job, final: Final, pairs: int) -> float:
    """Seconds for the intervals and tests of every evaluated model: resampling the held-out items."""
    if not final.models or not pairs:
        return 0.0
    items = np.random.default_rng(0).random(pairs)
    return (
        final.models * BOOTSTRAPS * clock(lambda: bootstrap_ci(items, resamples=job.recipe.evaluate.bootstrap, seed=0))
    )


def priced(work: Work, rates: Rates) -> Step:
    """A stage with its seconds here; every training starts a trainer with its own copy of the model."""
    seconds = work.flops / rates.of(work.kind) + (rates.train_seconds * work.trainings if work.kind == "train" else 0.0)
    return Step(work.stage, work.methods, work.rows, work.tokens, work.flops, seconds, work.kind, work.need)


def disk_bytes(job: Job, steps: list[Step]) -> float:
    """Adapters (or full models), scores and shards."""
    config = job.loaded.model.config.get_text_config()
    lora = sum(2 * job.recipe.lora.lora_r * 2 * config.hidden_size for _ in range(4))
    adapter = 4 * lora * config.num_hidden_layers
    models = sum(1 for s in steps if s.kind == "train") * (len(job.recipe.methods) + 4)
    return float(adapter * models + len(job.rows) * 200 * (len(job.recipe.methods) + 4))


def cheaper(job: Job, steps: list[Step]) -> list[str]:
    """What would cut the bill, with the seconds it would save."""
    advice = []
    gradients = sum(s.seconds for s in steps if s.need == "gradients")
    spec = job.recipe.warmup
    if gradients and spec.checkpoints == "all" and spec.num_train_epochs > 1:
        share = 1 - 1 / np.ceil(spec.num_train_epochs)
        advice.append(
            f"warmup.checkpoints: last saves {gradients * share:.0f} s: scores at one checkpoint instead of all"
        )
    maps = [s for s in steps if s.need == "gradients"]
    if len(maps) > 1:
        advice.append(
            f"one map instead of {len(maps)} saves {sum(s.seconds for s in maps[1:]):.0f} s: a pass over the pool each"
        )
    reference = sum(s.seconds for s in steps if s.need == "reference")
    if reference and job.recipe.reference.num_train_epochs > 1:
        advice.append(
            f"reference.num_train_epochs: 1 saves {reference * (1 - 1 / job.recipe.reference.num_train_epochs):.0f} s"
        )
    if gradients and not any(m.name in ("bm25", "dsir") for m in job.recipe.methods):
        advice.append("bm25 and dsir look at the same target and cost seconds: worth a row in the table")
    return advice


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the plan as a table, and what follows from it."""
    print_steps([Step(**step) for step in plan["steps"]], console)
    print_totals(plan, console)


def print_steps(steps: list[Step], console: Console) -> None:
    """One line a stage."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("stage", "for", "rows", "tokens", "TFLOP", "seconds"):
        table.add_column(name, justify="left" if name in ("stage", "for") else "right")
    for s in steps:
        table.add_row(s.stage, s.methods, str(s.rows), str(s.tokens), f"{s.flops / 1e12:.1f}", f"{s.seconds:.0f}")
    console.print(table)


def print_totals(plan: dict[str, Any], console: Console) -> None:
    """What the stages add up to, what the held-out data can show, and what would be cheaper."""
    rates = plan["rates_gflops"]
    probed = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    console.print(
        f"in all about {plan['total_seconds']:.0f} s here, peak memory about {plan['peak_gib']:.1f} GiB, disk about "
        f"{plan['disk_mib']:.0f} MiB" + (f" (probe, GFLOP/s: {probed})" if probed else ""),
        highlight=False,
    )
    if plan["total_flops"]:
        gpus = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in plan["gpus"].items())
        console.print(f"estimate, not measured: at {plan['utilisation']:.0%} of peak: {gpus}", highlight=False)
    if plan["heldout_pairs"]:
        seen, pairs_line = plan["accuracy_seen"], f"{plan['heldout_pairs']} held-out pairs: "
        pairs_line += (
            f"four of five comparisons tell accuracies apart that differ by {seen[0]:.3f} at best, by {seen[1]:.3f} if "
            "the models' answers are independent (docs/theory.md, 6.3)"
            if seen
            else "too few to tell two models apart by accuracy (docs/theory.md, 6.3)"
        )
        console.print(pairs_line, highlight=False)
    print_power(plan["power"], console)
    for line in plan["cheaper"]:
        console.print(f"cheaper: {line}", highlight=False)
