"""What a comparison says beyond its table: quality against cost, curves, and whether validation loss tells performance.

All of it is read off `comparison.json`'s own numbers; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.evaluate.statistics import correlations
from keepset.runfolder import layout

# What a comparison is summed up by, the first that was measured; the sign makes larger better.
QUALITY = (("accuracy.policy_mean.matched", 1), ("gsm8k.accuracy", 1), ("accuracy.policy_mean", 1),
           ("loss.chosen", -1), ("loss.heldout", -1))  # fmt: skip
LOSSES = ("loss.heldout", "loss.chosen")
PERFORMANCE = ("accuracy.policy_mean.matched", "accuracy.policy_mean", "accuracy.implicit_mean.matched",
               "margin.implicit_mean.matched", "margin.implicit_mean", "gsm8k.accuracy")  # fmt: skip


def qualities(summary: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """The metrics of `QUALITY` that were measured for every entry."""
    return [(m, sign) for m, sign in QUALITY if summary and all(m in entry["metrics"] for entry in summary)]


def pareto(summary: Sequence[dict[str, Any]], metric: str, sign: int = 1) -> list[dict[str, Any]]:
    """Entries by cost, with what no cheaper-or-equal entry does better marked as `front`.

    Args:
        summary: the comparison's.
        metric: what counts as quality.
        sign: −1 if smaller is better.

    Returns:
        `label`, `value`, `flops` (choosing + one training), `seconds` (as logged), `front`; cheapest first.
    """
    rows = [
        {
            "label": entry["label"], "value": entry["metrics"][metric]["value"],
            "flops": entry["cost"]["select_flops"] + entry["cost"]["train_flops"],
            "seconds": entry["cost"]["select_seconds"] + entry["cost"]["train_seconds"],
        }
        for entry in summary
    ]  # fmt: skip
    for row in rows:
        better = [o for o in rows if o is not row and o["flops"] <= row["flops"]]
        row["front"] = not any(
            sign * o["value"] > sign * row["value"] or (o["value"] == row["value"] and o["flops"] < row["flops"])
            for o in better
        )
    return sorted(rows, key=lambda row: (row["flops"], row["label"]))


def budget_curves(summary: Sequence[dict[str, Any]], metric: str) -> dict[str, list[dict[str, Any]]]:
    """Each method's points over budgets, by rows kept; methods with one budget have no curve.

    Top-k subsets of one score are nested, so a curve is not sampling noise of its own.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in summary:
        if metric in entry["metrics"] and entry["budget"] is not None:
            name = "random" if entry["kind"] == "random" else str(entry["label"]).rpartition("@")[0] or entry["label"]
            found.setdefault(name, []).append(
                {"budget": entry["budget"], "n_rows": entry["n_rows"], **entry["metrics"][metric]}
            )
    return {k: sorted(v, key=lambda p: p["n_rows"]) for k, v in found.items() if len({p["n_rows"] for p in v}) > 1}


def loss_against_performance(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How well a validation loss tells performance, over models or over models and their epochs.

    The papers argue for a reward-oriented target because it doesn't. Expected with a useful loss: a Spearman
    correlation near −1.

    Args:
        points: each `{"model": name, "metrics": {name: mean}}`.

    Returns:
        `loss`, `metric`, `n`, `spearman` and `pearson` over all points, and `within` = the mean Spearman correlation
        inside a model (over its epochs; None with fewer than three each). Pairs with fewer than three points are left
        out, as are metrics that don't vary.
    """
    out = []
    for loss in LOSSES:
        for metric in PERFORMANCE:
            some = [p for p in points if loss in p["metrics"] and metric in p["metrics"]]
            if len(some) < 3:
                continue
            x, y = (np.array([p["metrics"][k] for p in some], dtype=np.float64) for k in (loss, metric))
            link = correlations(x, y)
            if np.isnan(link.spearman):
                continue
            names = np.array([p["model"] for p in some])
            inside = [correlations(x[names == n], y[names == n]).spearman for n in set(names) if (names == n).sum() > 2]
            inside = [r for r in inside if not np.isnan(r)]
            out.append({"loss": loss, "metric": metric, "n": len(some), "spearman": link.spearman,
                        "pearson": link.pearson, "within": float(np.mean(inside)) if inside else None})  # fmt: skip
    return out


def means_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparison's rows as points: the base and every trained model, by its means."""
    return [{"model": layout.seeded(row["label"], row["seed"]),
             "metrics": {k: v["value"] for k, v in row["metrics"].items()}} for row in rows]  # fmt: skip


def print_tasks(result: dict[str, Any], console: Console, metric: str = "accuracy.policy_mean") -> None:
    """Print a metric of each task with its 95 % interval over items, where there are several tasks."""
    summary, start = result["summary"], f"{metric}.of."
    names = sorted({m for entry in summary for m in entry["metrics"] if m.startswith(start)})
    if not names:
        return
    table = Table("trained on", *(n.removeprefix(start) for n in names), box=SIMPLE_HEAD, pad_edge=False)
    for entry in summary:
        found = [entry["metrics"].get(n) for n in names]
        cells = ["–" if f is None else f"{f['value']:.2f} ({f['low']:.2f} to {f['high']:.2f})" for f in found]
        table.add_row(entry["label"], *cells)
    console.print(f"{metric} by task, 95 % interval over pairs:", highlight=False)
    console.print(table)


def print_verdict(result: dict[str, Any], console: Console) -> None:
    """Print accuracy by task, quality against cost, curves over budgets, and validation loss against performance."""
    print_tasks(result, console)
    for metric, sign in qualities(result["summary"])[:2]:
        table = Table("trained on", "total FLOPs", "logged s", metric, "", box=SIMPLE_HEAD, pad_edge=False)
        for row in pareto(result["summary"], metric, sign):
            mark = "front" if row["front"] else ""
            table.add_row(row["label"], f"{row['flops']:.2e}", f"{row['seconds']:.0f}", f"{row['value']:.3f}", mark)
        console.print(table)
        for name, points in budget_curves(result["summary"], metric).items():
            shown = "   ".join(f"{p['n_rows']} rows {p['value']:.3f}" for p in points)
            console.print(f"{name}: {shown}", highlight=False)
    if result["summary"]:
        console.print("front: nothing at that cost or less is better (choosing + one training).", highlight=False)
    for name, what in (("models", "trained models and the base"), ("epochs", "models and their epochs")):
        found = result.get("loss_vs_performance", {}).get(name) or []
        if found:
            table = Table(
                "loss", "performance", "points", "Spearman", "inside a model", box=SIMPLE_HEAD, pad_edge=False
            )
            for r in found:
                within = "–" if r["within"] is None else f"{r['within']:+.2f}"
                table.add_row(r["loss"], r["metric"], str(r["n"]), f"{r['spearman']:+.2f}", within)
            console.print(f"validation loss against performance over {what}:", highlight=False)
            console.print(table)
