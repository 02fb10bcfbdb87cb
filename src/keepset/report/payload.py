"""The data that goes into the page: figures over all rows, and the rows themselves (a sample if there are many)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keepset.pipeline.metrics import headlines, is_loss, unit_of
from keepset.pipeline.remedies import kinds
from keepset.report.answer import answers, bars, prices
from keepset.report.numbers import (
    cut_of,
    heat,
    histogram,
    length_bucket,
    length_correlation,
    number,
    overlap,
    shares,
)
from keepset.report.read import Message, RunData, as_dict, as_list
from keepset.runfolder.records import Mean

TEXT_BUDGET = 12_000_000  # characters of row text in the page
QUARANTINE_ROWS = 2_000
CONTROLS = ("random", "longest", "shortest", "length")


def choosing(data: RunData) -> list[str]:
    """The labels that are no controls; all where there are none but controls."""
    return [m for m in data.columns if data.method_names.get(m, m) not in CONTROLS] or list(data.columns)


def examples(columns: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """Rows to read: the three best kept ones; and of those left out the two nearest to the cut and the last one."""
    score, kept = columns["score"], columns["selected"] > 0
    cut = cut_of(score, kept.astype(float))
    order = np.argsort(-score, kind="stable")
    order = order[np.isfinite(score[order])]
    below = [int(i) for i in order if not kept[i] and (cut is None or score[i] <= cut)]
    return [int(i) for i in order if kept[i]][:3], [*below[:2], *below[2:][-1:]]


def sample_rows(data: RunData, max_rows: int, asked: Iterable[int] = ()) -> np.ndarray:
    """Indices of the rows that go into the page: all kept and asked ones, then the smallest ids, a fair draw."""
    n = len(data.ids)
    kept = np.zeros(n, bool)
    kept[list(asked)] = True
    for columns in data.columns.values():
        kept |= columns["selected"] > 0
    others = np.flatnonzero(~kept)
    room = max(0, max_rows - int(kept.sum()))
    if len(others) > room:
        others = others[np.argsort(data.ids[others].astype(str), kind="stable")[:room]]
    return np.sort(np.concatenate([np.flatnonzero(kept), others]))


def clipped(messages: list[Message], limit: int) -> list[list[str]]:
    """Messages as [role, text], each text cut to its part of `limit` characters, saying how much is left out."""
    room = max(80, limit // max(1, len(messages)))
    out = []
    for message in messages:
        text = message["content"]
        if len(text) > room:
            text = f"{text[:room]}… ({len(text) - room:,} more characters)"
        out.append([message["role"] + ("" if message.get("train", True) else ", not trained on"), text])
    return out


def codes(names: np.ndarray) -> tuple[list[str], list[int]]:
    """Distinct names (sorted) and each row's index among them."""
    distinct, inverse = np.unique(names.astype(str), return_inverse=True)
    return [str(name) for name in distinct], [int(i) for i in inverse]


def numbers(values: np.ndarray) -> list[float | int | None]:
    """A column for JSON: whole numbers as int, the others with 8 digits, NaN as null."""
    out: list[float | int | None] = []
    for value in values:
        rounded = number(float(value), 8)
        out.append(int(rounded) if rounded is not None and rounded == int(rounded) else rounded)
    return out


def build_payload(data: RunData, *, max_rows: int = 20_000) -> dict[str, Any]:
    """Everything the page shows, as plain JSON values (no NaN)."""
    shown = {label: examples(columns) for label, columns in data.columns.items()}
    rows = sample_rows(data, max_rows, {k for sides in shown.values() for side in sides for k in side})
    place = {int(row): at for at, row in enumerate(rows)}
    limit = min(6_000, max(300, TEXT_BUDGET // max(1, len(rows))))
    sources, source = codes(data.source[rows])
    categories, category = codes(data.category[rows])
    return {
        "summary": summary(data, len(rows)),
        "methods": [method_numbers(data, label) for label in data.columns],
        "overlap": overlap(data.columns),
        "metrics": metrics_of(data),
        "comparison": bars(data.comparison),
        "answers": answers(data.comparison),
        "examples": {label: [[place[k] for k in side] for side in sides] for label, sides in shown.items()},
        "prices": prices(data.comparison, data.costs, choosing(data)),
        "truth": truth_of(data),
        "findings": [asdict(kind) for kind in kinds(data.findings, data.path, data.recipe)],
        "quarantine": data.quarantine[:QUARANTINE_ROWS],
        "manifest": data.manifest,
        "recipe": data.recipe_text,
        "costs": data.costs,
        "rows": {
            "id": [str(i) for i in data.ids[rows]],
            "sources": sources,
            "source": source,
            "categories": categories,
            "category": category,
            "n_tokens": numbers(data.n_tokens[rows]),
            "why": why_of(data, {str(i) for i in data.ids[rows]}),
            "messages": [clipped(data.messages.get(str(i), []), limit) for i in data.ids[rows]],
            "methods": {
                label: {name: numbers(values[rows]) for name, values in columns.items()}
                for label, columns in data.columns.items()
            },
        },
    }


def why_of(data: RunData, ids: set[str]) -> dict[str, dict[str, Any]]:
    """What the models said about rows (`explain.write_why`), by label and id; entries of another form are left out."""
    out: dict[str, dict[str, Any]] = {}
    for label, entries in data.why.items():
        for id_, entry in as_dict(entries).items():
            if label not in data.columns or id_ not in ids or not isinstance(entry, dict):
                continue
            tokens = [t for t in entry.get("tokens") or [] if isinstance(t, list) and len(t) == 3]
            if tokens or isinstance(entry.get("pairs"), list):
                out.setdefault(label, {})[id_] = {
                    **({"tokens": tokens} if tokens else {}),
                    **({"pairs": as_list(entry["pairs"])} if entry.get("pairs") else {}),
                    "left_out": entry.get("left_out", 0),
                    "weights": entry.get("weights", []),
                    "without": entry.get("without"),
                }
    return out


def summary(data: RunData, shown: int) -> dict[str, Any]:
    """The facts of the head of the page."""
    recipe = data.recipe
    # "score X" encloses the stages it ran
    parts = [entry for entry in data.costs if not str(entry.get("stage", "")).startswith("score ")]
    seconds = [float(entry["seconds"]) for entry in parts if isinstance(entry.get("seconds"), (int, float))]
    return {
        "run": data.path.resolve().name,
        "rows": len(data.ids),
        "shown": shown,
        "without_text": sum(str(i) not in data.messages for i in data.ids),
        "quarantined": len(data.quarantine),
        "tokens": number(float(np.nansum(data.n_tokens))) if np.isfinite(data.n_tokens).any() else None,
        "budgets": budgets(recipe.budget) if recipe else [],
        "model": recipe.model.model_name_or_path if recipe else None,
        "pools": [spec.name or Path(spec.path).name for spec in recipe.pool] if recipe else [],
        "targets": [spec.name or Path(spec.path).name for spec in recipe.target] if recipe else [],
        "seconds": number(sum(seconds)) if seconds else None,
        "unit": data.length_unit,
    }


def budgets(value: Any) -> list[str]:
    """The recipe's budget or budgets as text."""
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def method_numbers(data: RunData, label: str) -> dict[str, Any]:
    """One method's figures over all rows."""
    columns = data.columns[label]
    score, selected = columns["score"], columns["selected"]
    kept = selected > 0
    name = data.method_names.get(label, label)
    tasks = {name.removeprefix("task."): values for name, values in columns.items() if name.startswith("task.")}
    buckets = np.array([length_bucket(v) for v in data.n_tokens], dtype=object)
    with_category = any(data.category)
    return {
        "label": label,
        "name": name,
        "control": name in CONTROLS,
        "reasons": data.reasons.get(label, {}),
        "kept": int(kept.sum()),
        "scored": int(np.isfinite(score).sum()),
        "kept_tokens": number(float(np.nansum(data.n_tokens[kept]))) if np.isfinite(data.n_tokens).any() else None,
        "cut": number(cut_of(score, selected), 8),
        "best_dropped": number(best_dropped(score, kept), 8),
        "histogram": histogram(score, selected),
        "length": length_correlation(score, data.n_tokens),
        "mean_tokens": [
            number(float(np.nanmean(data.n_tokens[mask]))) if np.isfinite(data.n_tokens[mask]).any() else None
            for mask in (np.ones(len(kept), bool), kept)
        ],
        "shares": {
            "source": shares(data.source, selected),
            "category": shares(data.category, selected) if with_category else [],
            f"length in {data.length_unit}": shares(buckets, selected, ordered=True)
            if np.isfinite(data.n_tokens).any()
            else [],
        },
        "heat": heat(tasks, data.category if with_category else data.source, selected),
        "has_losses": {"loss_ini", "loss_ref"} <= set(columns),
        "parts": [name for name in columns if name not in ("score", "rank", "selected")],
    }


def best_dropped(score: np.ndarray, kept: np.ndarray) -> float:
    """The best score below the lowest kept one; rows above it were left out for another reason (a repeat, a quota)."""
    cut = cut_of(score, kept.astype(float))
    below = score[~kept & np.isfinite(score) & (score < (np.inf if cut is None else cut))]
    return float(np.max(below, initial=-np.inf))


def metrics_of(data: RunData) -> list[dict[str, Any]]:
    """What the comparison measured, its headlines first; which way is better, and the unit of a mean ("": unknown)."""
    measured = list(dict.fromkeys(m for row in (data.comparison.rows if data.comparison else ()) for m in row.metrics))
    lead = data.comparison.headline if data.comparison else ""
    first = [metric.name for metric in headlines(measured, lead) if metric.name in measured]
    names = [*first, *(name for name in measured if name not in first)]
    return [{"name": name, "lower_is_better": is_loss(name), "unit": unit_of(name)} for name in names]


def truth_of(data: RunData) -> dict[str, Any] | None:
    """What every score is worth, by design and outcome: two views, averaged over queries and of the mean over items."""
    found = data.validation
    if found is None:
        return None
    designs = [
        {
            "name": design.name, "models": design.models, "again": design.again, "kept": design.kept,
            "outcomes": [
                {"name": o.name, "queries": o.queries, "ceilings": [number(o.ceiling), number(o.ceiling_of_mean)],
                 "scores": [{"label": s.label, "views": [interval_of(s.lds), interval_of(s.of_mean)]}
                            for s in design.scores if s.outcome == o.name]}
                for o in design.outcomes
            ],
        }
        for design in found.designs
    ]  # fmt: skip
    deciles = [
        {"label": d.label, "outcome": d.outcome, "spearman": number(d.spearman), "p": number(d.p),
         "values": [number(v) for v in d.values], "unit": unit_of(d.outcome), "lower_is_better": is_loss(d.outcome)}
        for d in found.deciles
    ]  # fmt: skip
    return {"rows": found.rows, "designs": designs, "deciles": deciles}


def interval_of(mean: Mean) -> dict[str, float | None]:
    """A value with its interval."""
    return {"value": number(mean.value), "low": number(mean.low), "high": number(mean.high)}
