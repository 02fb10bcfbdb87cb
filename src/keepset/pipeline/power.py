"""What the held-out data can show at all, before anything is trained: by its counts, and by what was seen before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.data import load_pool
from keepset.evaluate.statistics import accuracy_power, smallest_difference
from keepset.pipeline.learn import Learner, item_metrics, members
from keepset.pipeline.metrics import headline_of, headlines, unit_of
from keepset.runfolder import layout
from keepset.runfolder.records import Comparison, Items, read_json

if TYPE_CHECKING:
    from keepset.stages.job import Job

SMALL = 0.2
"""A small difference of continuous measures, in standard deviations of the items' differences (Cohen's)."""
POINTS = 0.05
"""A difference of accuracies worth seeing."""


@dataclass(frozen=True)
class Shown:
    """What n items can show of one measure.

    Attributes:
        measure: its name.
        n: held-out items.
        smallest: difference that four of five comparisons see: in standard deviations of the items' differences; of
            shares of right answers the range from the best case to independent answers. Empty: too few to see any.
        measured: the same in the measure's unit, by the spread that this run folder has seen; None before a comparison.
        enough: items that see 0.2 standard deviations, or 0.05 of right answers (the same range).
    """

    measure: str
    n: int
    smallest: tuple[float, ...]
    measured: float | None
    enough: tuple[int, ...]

    @property
    def counted(self) -> bool:
        """Whether its items are right or wrong."""
        return is_counted(self.measure)


def is_counted(measure: str) -> bool:
    """Whether a measure's items are right or wrong."""
    return measure.split(".")[0] in ("accuracy", "gsm8k")


def held_out_counts(job: Job, learner: Learner) -> dict[str, int]:
    """Every measure that an evaluation of this recipe will give, and its items: by the evaluation's own code."""
    pairs, rows, spec = learner.eval_pairs, learner.eval_rows, job.recipe.evaluate
    pair_columns: dict[str, np.ndarray] = {}
    row_columns: dict[str, np.ndarray] = {}
    tasks, sources = {}, {}
    if pairs:
        for k, side in enumerate(("chosen", "rejected")):
            lengths = np.array([int(pair[k].supervised.sum()) for pair in pairs[0]])
            pair_columns |= {side: -lengths.astype(float), f"n_{side}": lengths}
        tasks = members(pairs[1])
    if rows:
        lengths = np.array([int(row.supervised.sum()) for row in rows[0]])
        row_columns, sources = {"nll": lengths.astype(float), "n_tokens": lengths}, members(rows[1])
    questions = np.zeros(min(len(load_pool(spec.gsm8k)), spec.gsm8k_limit)) if spec.gsm8k else None
    items = Items(pair_columns, tasks, row_columns, sources, questions)
    return {name: len(values) for name, values in item_metrics(items, items, spec.length_match).items()}


def check_headline(job: Job, learner: Learner) -> str:
    """The measure that is looked at first.

    Raises:
        RecipeError: `evaluate.headline` names one that the held-out data doesn't give.
    """
    return headline_of(held_out_counts(job, learner), job.recipe.evaluate.headline)


def what_can_be_seen(job: Job, learner: Learner) -> list[Shown]:
    """The headline and the other printed measures."""
    counts = held_out_counts(job, learner)
    lead = headline_of(counts, job.recipe.evaluate.headline)
    before = read_json(Comparison | None, job.run.load_json(layout.COMPARISON), layout.COMPARISON)
    known = (before.power if before else None) or {}
    found = []
    for metric in headlines(counts, lead):
        if metric.name not in counts:
            continue
        n, seen = counts[metric.name], known.get(metric.name)
        measured = smallest_seen(metric.name, n, seen.sd) if seen else None
        smallest: tuple[float, ...] = (smallest_difference(n, 1.0),)
        enough: tuple[int, ...] = (items_for(1.0, SMALL),)
        if is_counted(metric.name):
            smallest = accuracy_power(n) or ()
            enough = items_for(math.sqrt(POINTS), POINTS), items_for(math.sqrt(0.5), POINTS)
        found.append(Shown(metric.name, n, smallest, measured, enough))
    return found


def smallest_seen(measure: str, n: int, sd: float) -> float:
    """The difference that four of five comparisons see on n items, whose differences have a standard deviation `sd`.

    Of right or wrong it is no less than the best case (docs/theory.md, 6.3): models that answer alike on every item
    have sd 0 and say nothing about those that don't. NaN: too few items for any.
    """
    spread = smallest_difference(n, sd)
    if not is_counted(measure):
        return spread
    best = accuracy_power(n)
    return math.nan if best is None else max(best[0], spread)


def items_for(sd: float, difference: float) -> int:
    """Items of which four of five comparisons see a difference, if the items' differences have this sd."""
    return math.ceil((smallest_difference(1, sd) / difference) ** 2)


def print_power(found: list[dict[str, Any]], console: Console) -> None:
    """Print one line a measure, the headline first."""
    if not found:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("held-out measure", "items", "seen 4 in 5", "by this folder's spread", "would do"):
        table.add_column(name, justify="left" if name == "held-out measure" else "right")
    for number, one in enumerate(Shown(**f) for f in found):
        sizes = " to ".join(f"{v:.2f}" for v in one.smallest) or "none"
        wanted = f"{POINTS:g}" if one.counted else f"{SMALL:g} sd"
        measured = (
            "–" if one.measured is None or math.isnan(one.measured) else f"{one.measured:.3g} {unit_of(one.measure)}"
        )
        table.add_row(
            one.measure + (" (headline)" if number == 0 else ""), str(one.n),
            sizes + ("" if one.counted or not one.smallest else " sd"), measured,
            f"{' to '.join(f'{n:,}' for n in one.enough)} for {wanted}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "seen 4 in 5: the difference that four of five comparisons tell from none; sd: standard deviation\n"
        "of the items' differences (docs/theory.md, 6.3); would do: items for a small difference.",
        highlight=False,
    )
