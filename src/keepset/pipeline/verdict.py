"""What a comparison says beyond its table: quality against cost, curves, and whether validation loss tells performance.

All of it is read off `comparison.json`'s own numbers; nothing is run here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.evaluate.statistics import correlations
from keepset.pipeline.metrics import LOSSES, PERFORMANCE, QUALITY, Metric, headlines
from keepset.runfolder import layout
from keepset.runfolder.records import Comparison, Entry, Link, ModelRow, ParetoPoint, Point


def qualities(summary: Sequence[Entry], headline: str = "") -> list[Metric]:
    """The headline and the metrics of `QUALITY`, as far as they were measured for every entry."""
    first = headlines((), headline)[:1] if headline else []
    named = [*first, *(metric for metric in QUALITY if metric.name != headline)]
    return [metric for metric in named if summary and all(metric.name in entry.metrics for entry in summary)]


def pareto(summary: Sequence[Entry], metric: str, sign: int = 1) -> list[ParetoPoint]:
    """Entries by cost (choosing + one training), with what no cheaper-or-equal entry does better marked as `front`.

    `sign` is −1 where smaller is better. Returns the points, cheapest first.
    """

    def beats(other: Entry, entry: Entry) -> bool:
        if other is entry or other.cost.flops > entry.cost.flops:
            return False
        better, same = sign * other.metrics[metric].value, sign * entry.metrics[metric].value
        return better > same or (better == same and other.cost.flops < entry.cost.flops)

    points = []
    for entry in summary:
        front = not any(beats(other, entry) for other in summary)
        points.append(
            ParetoPoint(entry.label, entry.metrics[metric].value, entry.cost.flops, entry.cost.seconds, front)
        )
    return sorted(points, key=lambda point: (point.flops, point.label))


def budget_curves(summary: Sequence[Entry], metric: str) -> dict[str, list[Entry]]:
    """Each method's entries over budgets, by rows kept; methods with one budget have no curve.

    Top-k subsets of one score are nested, so a curve is not sampling noise of its own.
    """
    curves: dict[str, list[Entry]] = defaultdict(list)
    for entry in summary:
        if metric in entry.metrics and entry.budget is not None:
            curves["random" if entry.kind == "random" else entry.label.rpartition("@")[0] or entry.label].append(entry)
    return {
        name: sorted(entries, key=lambda entry: entry.n_rows)
        for name, entries in curves.items()
        if len({entry.n_rows for entry in entries}) > 1
    }


def loss_against_performance(points: Sequence[Point]) -> list[Link]:
    """How well a validation loss tells performance, over models or over models and their epochs.

    The papers argue for a reward-oriented target because it doesn't. Expected with a useful loss: a Spearman
    correlation near −1. Returns a link for each loss and metric that at least three points have and that vary.
    """
    links = []
    for loss in LOSSES:
        for metric in PERFORMANCE:
            both = [p for p in points if loss in p.metrics and metric in p.metrics]
            if len(both) < 3:
                continue
            x, y = (np.array([p.metrics[k] for p in both], dtype=np.float64) for k in (loss, metric))
            whole = correlations(x, y)
            if np.isnan(whole.spearman):
                continue
            names = np.array([p.model for p in both])
            inside = [correlations(x[names == n], y[names == n]).spearman for n in set(names) if (names == n).sum() > 2]
            inside = [r for r in inside if not np.isnan(r)]
            within = float(np.mean(inside)) if inside else None
            links.append(Link(loss, metric, len(both), whole.spearman, whole.pearson, within))
    return links


def means_of(rows: Sequence[ModelRow]) -> list[Point]:
    """The comparison's rows as points: the base and every trained model, by its means."""
    return [
        Point(
            row.label if row.seed is None else layout.seeded(row.label, row.seed), None,
            {name: mean.value for name, mean in row.metrics.items()},
        )
        for row in rows
    ]  # fmt: skip


def print_tasks(result: Comparison, console: Console) -> None:
    """Print the accuracy of each task with its 95 % interval over items, where there are several tasks."""
    metric = "accuracy.policy_mean"
    start = f"{metric}.of."
    names = sorted({m for entry in result.summary for m in entry.metrics if m.startswith(start)})
    if not names:
        return
    table = Table("trained on", *(n.removeprefix(start) for n in names), box=SIMPLE_HEAD, pad_edge=False)
    for entry in result.summary:
        means = [entry.metrics.get(n) for n in names]
        cells = ["–" if m is None else f"{m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for m in means]
        table.add_row(entry.label, *cells)
    console.print(f"{metric} by task, 95 % interval over pairs:", highlight=False)
    console.print(table)


def print_links(links: Sequence[Link], over: str, console: Console) -> None:
    """Print how well validation losses tell performance, if that was found out."""
    if not links:
        return
    table = Table("loss", "performance", "points", "Spearman", "inside a model", box=SIMPLE_HEAD, pad_edge=False)
    for link in links:
        within = "–" if link.within is None else f"{link.within:+.2f}"
        table.add_row(link.loss, link.metric, str(link.n), f"{link.spearman:+.2f}", within)
    console.print(f"validation loss against performance over {over}:", highlight=False)
    console.print(table)


def print_verdict(result: Comparison, console: Console) -> None:
    """Print accuracy by task, quality against cost, curves over budgets, and validation loss against performance."""
    print_tasks(result, console)
    for metric in [quality.name for quality in qualities(result.summary, result.headline)[:2]]:
        table = Table("trained on", "total FLOPs", "logged s", metric, "", box=SIMPLE_HEAD, pad_edge=False)
        for point in result.pareto[metric]:
            mark = "front" if point.front else ""
            table.add_row(point.label, f"{point.flops:.2e}", f"{point.seconds:.0f}", f"{point.value:.3f}", mark)
        console.print(table)
        for name, entries in budget_curves(result.summary, metric).items():
            shown = "   ".join(f"{entry.n_rows} rows {entry.metrics[metric].value:.3f}" for entry in entries)
            console.print(f"{name}: {shown}", highlight=False)
    if result.summary:
        console.print("front: nothing at that cost or less is better (choosing + one training).", highlight=False)
    print_links(result.loss_vs_performance.models, "trained models and the base", console)
    print_links(result.loss_vs_performance.epochs, "models and their epochs", console)
