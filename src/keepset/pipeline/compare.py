"""The verdict: every method beside Random of the same size, the controls and the base, with intervals and costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.evaluate.statistics import bootstrap_ci, holm_by_label, paired_test, win_tie_loss
from keepset.pipeline.learn import epoch_points, item_metrics
from keepset.pipeline.metrics import Metric, headline_of, headlines
from keepset.pipeline.power import smallest_seen
from keepset.pipeline.price import cost_of, full_training_flops, selection_cost
from keepset.pipeline.verdict import loss_against_performance, means_of, pareto, qualities
from keepset.runfolder import layout
from keepset.runfolder.records import (
    Comparison,
    Entry,
    Items,
    Links,
    Mean,
    MeanOverSeeds,
    ModelRow,
    Power,
    SelectionCost,
    TrainingSet,
    Versus,
)

if TYPE_CHECKING:
    from keepset.pipeline.choose import Subset
    from keepset.stages.job import Job

Metrics = dict[str, np.ndarray]  # metric -> (n,) its items


@dataclass(frozen=True)
class Cell:
    """An evaluated model: what it was trained on (None: the base), the training seed, its items."""

    subset: Subset | None
    seed: int | None
    items: Items


def compare(job: Job, cells: list[Cell]) -> Comparison:
    """Compare evaluated cells and write `comparison.json`.

    Returns:
        `rows`: one a trained model, each metric with its bootstrap 95 % interval over items. `summary`: one a subset
        (all seeds of Random together), the mean over seeds, the interval over items of the seed-averaged items, the
        standard deviation over seeds (`spread`), the paired difference to Random (interval, p, Holm-adjusted p over
        methods), wins / ties / losses by item against Random, and cost. A mix's Random is the mean of the mixes that
        take a part by `random-*`. `headline`: see `metrics.headline_of`; `power`: see `powers`; `pareto` and
        `loss_vs_performance`: see `keepset.pipeline.verdict`.
    """
    base = next((cell.items for cell in cells if cell.subset is None), None)
    lead = ""
    resamples, seed = job.recipe.evaluate.bootstrap, job.recipe.seed
    rows, groups = [], defaultdict(list)
    for cell in cells:
        metrics = item_metrics(cell.items, base, job.recipe.evaluate.length_match)
        lead = lead or headline_of({name: len(items) for name, items in metrics.items()}, job.recipe.evaluate.headline)
        means = {k: Mean(**vars(bootstrap_ci(v, resamples=resamples, seed=seed))) for k, v in metrics.items()}
        rows.append(ModelRow(**vars(describe(cell.subset)), seed=cell.seed, metrics=means))
        groups[group_of(cell.subset)].append((cell.subset, metrics))
    rivals = Rivals(job, groups)
    summary = adjusted([entry_of(job, name, members, rivals, lead) for name, members in groups.items()])
    full = full_training_flops(job)
    result = Comparison(
        rows=tuple(rows), summary=tuple(summary), full_training_flops=full,
        selection=selection_cost(job, full),
        pareto={m.name: tuple(pareto(summary, m.name, m.sign)) for m in qualities(summary, lead)},
        loss_vs_performance=Links(
            tuple(loss_against_performance(means_of(rows))), tuple(loss_against_performance(epoch_points(job)))
        ),
        headline=lead, power=powers(groups, rivals, lead),
    )  # fmt: skip
    job.run.save_json(layout.COMPARISON, result.to_json())
    return result


class Rivals:
    """What a subset is held against: Random of the same budget; for a mix, the mixes that draw a part at random."""

    def __init__(self, job: Job, groups: dict[str, list[tuple[Subset | None, Metrics]]]) -> None:
        members = [member for group in groups.values() for member in group]
        budgets = {s.budget for s, _ in members if s is not None and s.kind == "random"}
        self.random = {b: mean_items([m for _, m in groups[f"random ({b})"]]) for b in budgets}
        self.random_mixes = {m.label for m in job.recipe.mix if any(p.method.startswith("random") for p in m.parts)}
        self.mix = mean_items([m for subset, m in members if subset and subset.label in self.random_mixes])

    def of(self, subset: Subset | None) -> Metrics:
        """Its rival's items; empty where it has none, as Random and the base have."""
        if subset is None or subset.kind == "random":
            return {}
        drawn_mix = subset.label in self.random_mixes
        return self.mix if subset.kind == "mix" and not drawn_mix else self.random.get(subset.budget, {})


def powers(groups: dict[str, list[tuple[Subset | None, Metrics]]], rivals: Rivals, lead: str) -> dict[str, Power]:
    """What the held-out items can show of each headline: by the spread of the items' differences to Random.

    The standard deviation is the root mean square of those of all subsets that are held against Random; items averaged
    over seeds.
    """
    spreads: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for members in groups.values():
        averaged, rival = mean_items([m for _, m in members]), rivals.of(members[0][0])
        for metric in headlines(averaged, lead) if rival else []:
            if metric.name in averaged and len(averaged[metric.name]) > 1:
                difference = averaged[metric.name] - rival[metric.name]
                spreads[metric.name].append((len(difference), float(difference.std(ddof=1))))
    found = {}
    for name, each in spreads.items():
        n, sd = each[0][0], float(np.sqrt(np.mean([sd**2 for _, sd in each])))
        found[name] = Power(n, sd, smallest_seen(name, n, sd))
    return found


def entry_of(
    job: Job, group: str, members: list[tuple[Subset | None, Metrics]], rivals: Rivals, lead: str
) -> Entry:  # fmt: skip
    """The summary of one group of cells, its p-values not yet adjusted."""
    subset = members[0][0]
    resamples, seed = job.recipe.evaluate.bootstrap, job.recipe.seed
    averaged, rival = mean_items([m for _, m in members]), rivals.of(subset)
    means, versus = {}, {}
    for name, values in averaged.items():
        over_seeds = [float(np.mean(m[name])) for _, m in members]
        spread = float(np.std(over_seeds, ddof=1)) if len(over_seeds) > 1 else None
        interval = bootstrap_ci(values, resamples=resamples, seed=seed)
        means[name] = MeanOverSeeds(**vars(interval), spread=spread)
    for metric in headlines(averaged, lead) if rival else []:
        if metric.name in averaged:
            ours, theirs = averaged[metric.name], rival[metric.name]
            test = paired_test(ours, theirs, resamples=resamples, seed=seed)
            counts = win_tie_loss(metric.sign * ours, metric.sign * theirs)
            versus[metric.name] = Versus(**vars(test), win_tie_loss=counts)
    described = replace(describe(subset), label=group.split(" (")[0])
    return Entry(**vars(described), seeds=len(members), metrics=means, vs_random=versus,
                 cost=cost_of(job, subset))  # fmt: skip


def describe(subset: Subset | None) -> TrainingSet:
    """Name, kind and size of a subset."""
    if subset is None:
        return TrainingSet("base", "base", None, 0, 0)
    return TrainingSet(subset.name, subset.kind, subset.budget, subset.n_rows, subset.n_tokens)


def group_of(subset: Subset | None) -> str:
    """Cells that are seeds of one thing share a group: the seeds of Random, and the training seeds of a subset."""
    if subset is None:
        return "base"
    return f"random ({subset.budget})" if subset.kind == "random" else subset.name


def mean_items(members: Sequence[Metrics]) -> Metrics:
    """Each metric's items averaged over seeds (the items are the same held-out pairs and rows)."""
    return {k: np.mean([m[k] for m in members], axis=0) for k in members[0]} if members else {}


def adjusted(summary: Sequence[Entry]) -> list[Entry]:
    """The entries with Holm-adjusted p-values over the methods, metric by metric."""
    adjusted_p: dict[str, dict[str, float]] = {}
    for metric in {metric for entry in summary for metric in entry.vs_random}:
        tested = {entry.label: entry.vs_random[metric].p for entry in summary if metric in entry.vs_random}
        adjusted_p[metric] = holm_by_label(tested)
    return [
        replace(entry, vs_random={m: replace(v, p_holm=adjusted_p[m][entry.label]) for m, v in entry.vs_random.items()})
        for entry in summary
    ]


def tell_selection_cost(cost: SelectionCost) -> str:
    """One line for the end of a run."""
    share = f", {100 * cost.share:.0f} % of one training on the full pool" if cost.share is not None else ""
    return f"choosing by all methods: {cost.tokens} tokens, {cost.flops:.2g} FLOPs{share}; {cost.seconds:.0f} s"


def print_comparison(result: Comparison, console: Console) -> None:
    """Print the summary as one table: value, half-width of its interval or spread over seeds, `*` where p < 0.05."""
    shown = distinct_columns(result)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("trained on", no_wrap=True)
    for heading in ("rows", "tokens", *(metric.heading for metric in shown), "price"):
        table.add_column(heading, justify="right", no_wrap=True)
    full = result.full_training_flops
    for entry in result.summary:
        cells = [cell_text(entry, metric) for metric in shown]
        share = f"{100 * entry.cost.select_flops / full:.0f} %" if full and entry.kind == "method" else "–"
        name = f"{entry.label} x{entry.seeds}" if entry.seeds > 1 else entry.label
        table.add_row(name, str(entry.n_rows or "–"), str(entry.n_tokens or "–"), *cells, share)
    seen = {name: power.smallest for name, power in (result.power or {}).items() if not np.isnan(power.smallest)}
    if seen:
        smallest = [f"{seen[m.name]:.{m.decimals}f}" if m.name in seen else "–" for m in shown]
        table.add_section()
        table.add_row("seen 4 in 5", "", "", *smallest, "")
    console.print(table)
    console.print(
        "±: half of the 95 % interval over held-out items; for Random, its standard\ndeviation over seeds. "
        "accuracy: chosen preferred to rejected by log-probability\na token; matched: pairs of like length; "
        "implicit: against the base. tokens:\nsupervised ones. * p < 0.05 against Random (paired over items, Holm).\n"
        "price: FLOPs of choosing by count, each method alone, over those of one\ntraining on the full pool."
        + ("\nseen 4 in 5: the difference to Random that four of five such comparisons find." if seen else ""),
        highlight=False,
    )


def distinct_columns(result: Comparison) -> list[Metric]:
    """The headlines that were measured; of an accuracy that on pairs of like length, where there is one.

    Left out too is what repeats another column in every row.
    """
    shown: list[Metric] = []
    seen: set[tuple[float | None, ...]] = set()
    for metric in headlines({m for entry in result.summary for m in entry.metrics}, result.headline):
        if any(other.name == f"{metric.name}.matched" for other in shown):
            continue
        means = [entry.metrics.get(metric.name) for entry in result.summary]
        values = tuple(None if mean is None else mean.value for mean in means)
        if any(v is not None for v in values) and values not in seen:
            seen.add(values)
            shown.append(metric)
    return shown


def cell_text(entry: Entry, metric: Metric) -> str:
    """`0.61 ±0.08*`; losses without the ±, since their spread over items says nothing about differences."""
    mean = entry.metrics.get(metric.name)
    if mean is None:
        return "–"
    width = mean.spread if entry.kind == "random" else (mean.high - mean.low) / 2
    text = f"{mean.value:.{metric.decimals}f}"
    if width is not None and not metric.is_loss:
        text += f" ±{width:.{metric.decimals}f}"
    versus = entry.vs_random.get(metric.name)
    return text + ("*" if versus is not None and versus.p_holm is not None and versus.p_holm < 0.05 else "")
