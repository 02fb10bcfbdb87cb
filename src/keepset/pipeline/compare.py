"""The verdict: every method beside Random of the same size, the controls and the base, with intervals and costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.evaluate.statistics import bootstrap_ci, holm_by_label, paired_test, win_tie_loss
from keepset.pipeline.learn import Items, epoch_points, item_metrics
from keepset.pipeline.price import cost_of, full_training_flops, selection_cost
from keepset.pipeline.verdict import loss_against_performance, means_of, pareto, qualities
from keepset.runfolder import layout

if TYPE_CHECKING:
    from keepset.pipeline.choose import Subset
    from keepset.stages.job import Job

Cell = tuple["Subset | None", int | None, Items]  # subset (None: base), training seed, evaluated items

# What is printed, in this order: metric, heading, decimals, and the sign that makes larger better.
HEADLINES: tuple[tuple[str, str, int, int], ...] = (
    ("accuracy.policy_mean.matched", "accuracy\nmatched", 2, 1),
    ("accuracy.policy_mean", "accuracy\nall", 2, 1),
    ("margin.implicit_mean.matched", "implicit\nmargin", 3, 1),
    ("loss.chosen", "loss of\nchosen", 3, -1),
    ("loss.heldout", "held-out\nloss", 3, -1),
    ("gsm8k.accuracy", "GSM8K\nexact", 2, 1),
)


def headlines(measured: Collection[str]) -> list[tuple[str, str, int, int]]:
    """The headlines, with the held-out loss by source where there are several."""
    sources = sorted(m for m in measured if m.startswith("loss.heldout."))
    more = [(m, "loss of\n" + m.removeprefix("loss.heldout."), 3, -1) for m in sources]
    place = 1 + next(i for i, h in enumerate(HEADLINES) if h[0] == "loss.heldout")
    return [*HEADLINES[:place], *more, *HEADLINES[place:]]


def compare(job: Job, cells: list[Cell]) -> dict[str, Any]:
    """Compare evaluated cells and write `comparison.json`.

    Returns:
        `rows`: one a trained model, each metric with its bootstrap 95 % interval over items. `summary`: one a subset
        (all seeds of Random together), the mean over seeds, the interval over items of the seed-averaged items, the
        standard deviation over seeds (`spread`), the paired difference to Random (interval, p, Holm-adjusted p over
        methods), wins / ties / losses by item against Random, and cost. A mix's Random is the mean of the mixes that
        take a part by `random-*`. `pareto` and `loss_vs_performance`: see `keepset.pipeline.verdict`.
    """
    base = next((items for subset, _, items in cells if subset is None), None)
    share, resamples, seed = job.recipe.evaluate.length_match, job.recipe.evaluate.bootstrap, job.recipe.seed
    per_item = [item_metrics(items, base, share) for _, _, items in cells]
    rows, groups = [], defaultdict(list)
    for (subset, train_seed, _), metrics in zip(cells, per_item, strict=True):
        rows.append(
            {
                **describe(subset),
                "seed": train_seed,
                "metrics": {k: bootstrap_ci(v, resamples=resamples, seed=seed).as_dict() for k, v in metrics.items()},
            }
        )
        groups[group_of(subset)].append((subset, metrics))
    budgets = {s.budget for s, _, _ in cells if s is not None and s.kind == "random"}
    random_means = {b: mean_items([m for _, m in groups[f"random ({b})"]]) for b in budgets}
    # A mix is held against the mixes that draw a part at random.
    random_mixes = {m.label for m in job.recipe.mix if any(p.method.startswith("random") for p in m.parts)}
    mixed = mean_items([m for subset, m in sum(groups.values(), []) if subset and subset.label in random_mixes])
    summary = []
    for name, members in groups.items():
        subset = members[0][0]
        averaged = mean_items([m for _, m in members])
        entry = {
            **describe(subset),
            "label": name.split(" (")[0],
            "seeds": len(members),
            "metrics": {},
            "vs_random": {},
        }
        for metric, values in averaged.items():
            over_seeds = [float(np.mean(m[metric])) for _, m in members]
            spread = float(np.std(over_seeds, ddof=1)) if len(over_seeds) > 1 else None
            interval = bootstrap_ci(values, resamples=resamples, seed=seed).as_dict()
            entry["metrics"][metric] = {**interval, "spread": spread}
        rival = random_means.get(subset.budget) if subset is not None else None
        if subset is not None and subset.kind == "mix" and subset.label not in random_mixes:
            rival = mixed
        if rival and subset is not None and subset.kind != "random":
            for metric, _, _, sign in headlines(averaged):
                if metric in averaged:
                    test = paired_test(averaged[metric], rival[metric], resamples=resamples, seed=seed)
                    wins = win_tie_loss(sign * averaged[metric], sign * rival[metric])
                    entry["vs_random"][metric] = {**test.as_dict(), "win_tie_loss": list(wins)}
        entry["cost"] = cost_of(job, subset)
        summary.append(entry)
    adjust(summary)
    full, points = full_training_flops(job), epoch_points(job)
    result = {
        "rows": rows, "summary": summary, "full_training_flops": full, "selection": selection_cost(job, full),
        "pareto": {metric: pareto(summary, metric, sign) for metric, sign in qualities(summary)},
        "loss_vs_performance": {
            "models": loss_against_performance(means_of(rows)), "epochs": loss_against_performance(points),
        },
    }  # fmt: skip
    job.run.save_json(layout.COMPARISON, result)
    return result


def describe(subset: Subset | None) -> dict[str, Any]:
    """Name, kind and size of a subset, for JSON."""
    if subset is None:
        return {"label": "base", "kind": "base", "budget": None, "n_rows": 0, "n_tokens": 0}
    return {"label": subset.name, "kind": subset.kind, "budget": subset.budget, "n_rows": subset.n_rows,
            "n_tokens": subset.n_tokens}  # fmt: skip


def group_of(subset: Subset | None) -> str:
    """Cells that are seeds of one thing share a group: the seeds of Random, and the training seeds of a subset."""
    if subset is None:
        return "base"
    return f"random ({subset.budget})" if subset.kind == "random" else subset.name


def mean_items(members: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Each metric's items averaged over seeds (the items are the same held-out pairs and rows)."""
    return {k: np.mean([m[k] for m in members], axis=0) for k in members[0]} if members else {}


def adjust(summary: list[dict[str, Any]]) -> None:
    """Add Holm-adjusted p-values over the methods, metric by metric."""
    for metric, _, _, _ in headlines({m for entry in summary for m in entry["vs_random"]}):
        tested = {e["label"]: e["vs_random"][metric]["p"] for e in summary if metric in e["vs_random"]}
        for label, p in (holm_by_label(tested) if tested else {}).items():
            next(e for e in summary if e["label"] == label and e["vs_random"])["vs_random"][metric]["p_holm"] = p


def tell_selection_cost(found: dict[str, Any]) -> str:
    """One line for the end of a run."""
    share = f", {100 * found['share']:.0f} % of one training on the full pool" if found["share"] is not None else ""
    return (f"choosing by all methods: {found['tokens']} tokens, {found['flops']:.2g} FLOPs{share}; "
            f"{found['seconds']:.0f} s")  # fmt: skip


def print_comparison(result: dict[str, Any], console: Console) -> None:
    """Print the summary as one table: value, half-width of its interval or spread over seeds, `*` where p < 0.05."""
    shown = distinct_columns(result)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("trained on", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for _, heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("price", justify="right", no_wrap=True)
    full = result["full_training_flops"]
    for entry in result["summary"]:
        cells = [cell_text(entry, metric, decimals) for metric, _, decimals, _ in shown]
        share = f"{100 * entry['cost']['select_flops'] / full:.0f} %" if full and entry["kind"] == "method" else "–"
        name = f"{entry['label']} x{entry['seeds']}" if entry["seeds"] > 1 else entry["label"]
        table.add_row(name, str(entry["n_rows"] or "–"), str(entry["n_tokens"] or "–"), *cells, share)
    console.print(table)
    console.print(
        "±: half of the 95 % interval over held-out items; for Random, its standard\ndeviation over seeds. "
        "accuracy: chosen preferred to rejected by log-probability\na token; matched: pairs of like length; "
        "implicit: against the base. tokens:\nsupervised ones. * p < 0.05 against Random (paired over items, Holm).\n"
        "price: FLOPs of choosing by count, each method alone, over those of one\ntraining on the full pool.",
        highlight=False,
    )


def distinct_columns(result: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """The headlines that were measured, without those that repeat another one in every row (all pairs matched)."""
    shown: list[tuple[str, str, int, int]] = []
    seen: set[tuple[Any, ...]] = set()
    for headline in headlines({m for entry in result["summary"] for m in entry["metrics"]}):
        values = tuple(entry["metrics"].get(headline[0], {}).get("value") for entry in result["summary"])
        if any(v is not None for v in values) and values not in seen:
            seen.add(values)
            shown.append(headline)
    return shown


def cell_text(entry: dict[str, Any], metric: str, decimals: int) -> str:
    """`0.61 ±0.08*`; losses without the ±, since their spread over items says nothing about differences."""
    found = entry["metrics"].get(metric)
    if found is None:
        return "–"
    width = found["spread"] if entry["kind"] == "random" else (found["high"] - found["low"]) / 2
    text = f"{found['value']:.{decimals}f}"
    if width is not None and not metric.startswith("loss."):
        text += f" ±{width:.{decimals}f}"
    significant = entry["vs_random"].get(metric, {}).get("p_holm", 1.0) < 0.05
    return text + ("*" if significant else "")
