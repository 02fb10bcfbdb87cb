"""What an evaluation measures: the one table for the comparison, its verdict, the plots and the report's page.

`keepset.pipeline.learn.item_metrics` computes these and more of their kind; a name begins with what is measured
(`accuracy`, `margin`, `loss`, `gsm8k`), and ends with `.matched` on pairs of like length alone, with `.of.<task>` on
those of a task, with `loss.heldout.<source>` on rows of a source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from keepset.errors import RecipeError, did_you_mean
from keepset.runfolder.records import Versus

HELD_OUT = "loss.heldout"


@dataclass(frozen=True)
class Metric:
    """One number an item, averaged over items.

    Attributes:
        name: as in `comparison.json`.
        heading: of its column, two lines; "" where it has none.
        decimals: that are printed.
        unit: of a mean.
        headline: place among the columns that are printed and compared with Random; None: not one of them.
        quality: place among what a comparison is summed up by, of which the first ones measured are taken.
        by_task: also told for each task of the pairs.
    """

    name: str
    heading: str
    decimals: int
    unit: str
    headline: int | None = None
    quality: int | None = None
    by_task: bool = False

    @property
    def is_loss(self) -> bool:
        """Whether it is a validation loss: smaller is better. Everything else is performance: larger is better."""
        return is_loss(self.name)

    @property
    def sign(self) -> int:
        """What makes larger better."""
        return -1 if self.is_loss else 1


def is_loss(name: str) -> bool:
    """Whether a metric, also one that isn't in the table, is a loss: smaller is better."""
    return name.split(".")[0] == "loss"


METRICS = (
    Metric("accuracy.policy_mean.matched", "accuracy\nmatched", 2, "share of pairs", headline=1, quality=1),
    Metric("accuracy.policy_mean", "accuracy\nall", 2, "share of pairs", headline=2, quality=3, by_task=True),
    Metric("accuracy.implicit_mean.matched", "", 2, "share of pairs"),
    Metric("margin.implicit_mean.matched", "implicit\nmargin", 3, "nats a token", headline=3),
    Metric("margin.implicit_mean", "", 3, "nats a token"),
    Metric("gsm8k.accuracy", "GSM8K\nexact", 2, "share of questions", headline=6, quality=2),
    Metric(HELD_OUT, "held-out\nloss", 3, "nats a token", headline=5, quality=5),
    Metric("loss.chosen", "loss of\nchosen", 3, "nats a token", headline=4, quality=4, by_task=True),
    Metric("loss.preference", "preference\nloss", 4, "nats a pair"),
)

HEADLINES = tuple(sorted((m for m in METRICS if m.headline is not None), key=lambda m: m.headline or 0))
QUALITY = tuple(sorted((m for m in METRICS if m.quality is not None), key=lambda m: m.quality or 0))
LOSSES = tuple(m.name for m in METRICS if m.is_loss)
PERFORMANCE = tuple(m.name for m in METRICS if not m.is_loss)
BY_TASK = tuple(m.name for m in METRICS if m.by_task)


CONTINUOUS = ("margin.implicit_mean.matched", "loss.preference", HELD_OUT)
"""What is looked at first where the recipe names nothing, in this order: numbers an item that no length moves.

A margin or a loss says how far a pair moved, an accuracy only whether it crossed 0; and of sums the longer side wins.
"""
FEWEST_MATCHED = 16
"""Pairs of like length below which the margin on them tells nothing (docs/theory.md, 6.3)."""


def headline_of(measured: Mapping[str, int], named: str | None = None) -> str:
    """The measure that is looked at first; "" where nothing is measured.

    Args:
        measured: each measure's items. Which measure it is depends on the held-out data alone, never on what came out.
        named: the recipe's `evaluate.headline`.

    Raises:
        RecipeError: the named one is not measured.
    """
    if named is not None and named not in measured:
        hint = did_you_mean(named, list(measured)) or f"; there are: {', '.join(measured)}"
        raise RecipeError(f"evaluate.headline: '{named}' is not measured here{hint}")
    if named is not None:
        return named
    for name in CONTINUOUS:
        if measured.get(name, 0) >= (FEWEST_MATCHED if name.endswith(".matched") else 1):
            return name
    return next((m.name for m in HEADLINES if m.name in measured), "")


def headlines(measured: Collection[str], first: str = "") -> list[Metric]:
    """The headlines, `first` before the others, with the held-out loss by source where there are several."""
    found = _headlines(measured)
    if not first:
        return found
    known = {m.name: m for m in (*METRICS, *found)}
    lead = known.get(first) or Metric(first, first.replace(".", "\n", 1), 3, unit_of(first))
    return [lead, *(m for m in found if m.name != first)]


def _headlines(measured: Collection[str]) -> list[Metric]:
    metrics = []
    for metric in HEADLINES:
        metrics.append(metric)
        if metric.name == HELD_OUT:
            start = f"{HELD_OUT}."
            sources = sorted(name for name in measured if name.startswith(start))
            metrics += [replace(metric, name=s, heading="loss of\n" + s.removeprefix(start)) for s in sources]
    return metrics


def unit_of(name: str) -> str:
    """The unit of a metric, of its part on a task or a source too; "" for one that isn't in the table."""
    rows = [m for m in METRICS if f"{name}.".startswith(f"{m.name}.")]
    return max(rows, key=lambda m: len(m.name)).unit if rows else ""


def p_of(versus: Versus) -> float:
    """Holm's p where it is known, else the plain one."""
    return versus.p if versus.p_holm is None else versus.p_holm


def told(name: str, versus: Versus) -> str:
    """Whether a training set is "better" or "worse" than Random on a measure; "": not told apart."""
    if not p_of(versus) < 0.05:
        return ""
    return "better" if (versus.difference > 0) != is_loss(name) else "worse"
