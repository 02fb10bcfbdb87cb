"""`keepset explain RUN ROW`: why a row was kept or not, and what would change that. Reads the run folder; no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepset.data.turns import is_learnt
from keepset.data.words import ngram_vectors
from keepset.errors import KeepsetError, did_you_mean
from keepset.report.explain_pairs import COSINES, pair_pulls, tell_without
from keepset.report.explain_tokens import tokens_of_rows
from keepset.report.read import RunData, find_row, read_run
from keepset.runfolder import layout
from keepset.runfolder.run import Run
from keepset.runfolder.truth import Validation

NEIGHBOURS = 3
EACH = 3  # validation rows kept for each direction
ROWS = 2_000  # most rows a method


def explain(run_dir: Path, row_id: str, label: str | None = None) -> dict[str, Any]:
    """Explain one row of a run.

    The id may be given by its beginning; the method is by default the recipe's first.

    Returns:
        JSON-ready: `id`, `label`, `method`, `source`, `category`, `n_tokens`, `score`, `rank`, `of`, `percentile`
        (share of scored rows below it), `selected`, `cut` (lowest kept score), `gap` (score − cut), `verdict`, `change`
        (what would turn the decision round), `reason` (why it has no score), `parts`, `tasks`, `checkpoints`, `methods`
        (every method's view), `nearest` (kept rows most alike, by the cosine of hashed n-grams), `truth` (what
        `keepset validate` found of the method, and of the row where it was left out), `messages`.

    Raises:
        KeepsetError: no scores in the folder, no such label, or no row (or several) of that id.
    """
    data = read_run(Path(run_dir))
    if label is not None and label not in data.columns:
        hint = did_you_mean(label, list(data.columns)) or f"; there are: {', '.join(data.columns)}"
        raise KeepsetError(f"{run_dir}: no scores by '{label}'{hint}")
    label = label or next(iter(data.columns))
    at = find_row(data, row_id)
    columns = data.columns[label]
    score, selected = columns["score"], columns["selected"] > 0
    own = float(score[at])
    scored = np.isfinite(score)
    id_ = str(data.ids[at])
    facts: dict[str, Any] = {
        "id": id_,
        "label": label,
        "method": data.method_names.get(label, label),
        "source": str(data.source[at]),
        "category": str(data.category[at]) or None,
        "n_tokens": finite(data.n_tokens[at]),
        "unit": data.length_unit,
        "score": finite(own),
        "rank": finite(columns["rank"][at]),
        "of": int(scored.sum()),
        "percentile": float((score[scored] < own).mean()) if math.isfinite(own) else None,
        "selected": bool(selected[at]),
        "cut": finite(score[selected & scored].min()) if (selected & scored).any() else None,
        "reason": data.reasons.get(label, {}).get(id_),
        "parts": {name: finite(values[at]) for name, values in columns.items() if name not in ("rank", "selected")},
        "tasks": tasks(columns, at),
        "checkpoints": checkpoints(columns, at),
        "methods": [
            {"label": name, "score": finite(c["score"][at]), "rank": finite(c["rank"][at]),
             "selected": bool(c["selected"][at])}
            for name, c in data.columns.items()
        ],
        "nearest": nearest(data, at, selected, columns),
        "truth": truth(data.validation, label, id_),
        "messages": data.messages.get(id_, []),
    }  # fmt: skip
    facts["gap"] = None if facts["score"] is None or facts["cut"] is None else facts["score"] - facts["cut"]
    facts["verdict"] = verdict(facts)
    facts["change"] = change(facts, score[scored & ~selected])
    return facts


def finite(value: float) -> float | None:
    """A number, or None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def tasks(columns: dict[str, np.ndarray], at: int) -> list[dict[str, Any]]:
    """Each target task's part of the score, strongest pull first, with the row's place among all rows in that task."""
    out = []
    for name, values in columns.items():
        if name.startswith("task.") and math.isfinite(values[at]):
            scored = values[np.isfinite(values)]
            place = int((scored > values[at]).sum()) + 1
            out.append({"task": name.removeprefix("task."), "value": float(values[at]), "rank": place})
    return sorted(out, key=lambda entry: -entry["value"])


def checkpoints(columns: dict[str, np.ndarray], at: int) -> list[dict[str, Any]]:
    """What each warm-up checkpoint said: cosine with the best task, gradient norm, learning rate, momentum share."""
    parts_of: dict[int, dict[str, Any]] = {}
    for name, values in columns.items():
        head, _, part = name.partition(".")
        if head.startswith("ckpt") and head[4:].isdigit() and part:
            parts_of.setdefault(int(head[4:]), {})[part] = finite(values[at])
    return [{"checkpoint": number, **parts} for number, parts in sorted(parts_of.items())]


def nearest(data: RunData, at: int, selected: np.ndarray, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The kept rows most like this one by the cosine of hashed word and word-pair counts."""
    others = [int(i) for i in np.flatnonzero(selected) if i != at and str(data.ids[i]) in data.messages]
    if str(data.ids[at]) not in data.messages or not others:
        return []
    texts = ["\n".join(m["content"] for m in data.messages[str(data.ids[i])]) for i in [at, *others]]
    vectors = ngram_vectors(texts)
    likeness = vectors[1:] @ vectors[0]
    best = np.argsort(-likeness, kind="stable")[:NEIGHBOURS]
    return [
        {"id": str(data.ids[others[k]]), "likeness": float(likeness[k]), "rank": finite(columns["rank"][others[k]]),
         "text": " ".join(texts[k + 1].split())[:160]}
        for k in best
    ]  # fmt: skip


def verdict(facts: dict[str, Any]) -> str:
    """One sentence: kept or not, and by how much."""
    label = facts["label"]
    if facts["score"] is None:
        return (
            f"{label} gave this row no score"
            + (f": {facts['reason']}" if facts["reason"] else "")
            + "; it can't be kept."
        )
    place = f"rank {facts['rank']:.0f} of {facts['of']}" if facts["rank"] is not None else "no rank"
    if facts["cut"] is None:
        return f"{label}: score {facts['score']:.4g}, {place}; nothing is selected yet."
    if facts["selected"]:
        return f"Kept by {label}: {place}, score {facts['score']:.4g}, {facts['gap']:.4g} above the lowest kept score."
    if facts["gap"] >= 0:
        return (
            f"Not kept by {label} although its score {facts['score']:.4g} ({place}) reaches the lowest kept one: "
            "a quota, a token budget, a repeat or an override left it out."
        )
    return f"Not kept by {label}: {place}, score {facts['score']:.4g}, {-facts['gap']:.4g} below the lowest kept score."


def change(facts: dict[str, Any], dropped: np.ndarray) -> str | None:
    """What would turn the decision round, in the terms of the method's own parts where those are understood.

    `dropped` are the scores of the rows that are scored and not kept.
    """
    score, cut, parts = facts["score"], facts["cut"], facts["parts"]
    if score is None or cut is None:
        return None
    if facts["selected"]:
        below = dropped[dropped < cut]  # those above it were left out for another reason: a repeat, a quota
        if not len(below):
            return "Only a smaller budget would leave it out."
        ahead = f"It goes out once its score falls below {below.max():.4g}, the next one"
        return ahead + (f", or the budget below {facts['rank']:.0f} rows." if (facts["rank"] or 0) > 1 else ".")
    if facts["gap"] >= 0:
        return "A larger budget, or another quota or dedup setting, would let it in."
    needed_score = f"It comes in at a score of {cut:.4g}, or at a budget of {facts['rank']:.0f} rows"
    ini, ref = parts.get("loss_ini"), parts.get("loss_ref")
    if ini and ref is not None and math.isclose(score, (ini - ref) / ini, rel_tol=1e-6, abs_tol=1e-9):
        needed = f"{ini * (1 - cut):.4g}, not {ref:.4g}"
        return f"{needed_score}. With its base loss of {ini:.4g} nats the reference loss would have to be {needed}."
    if facts["tasks"] and math.isclose(score, facts["tasks"][0]["value"], rel_tol=1e-6, abs_tol=1e-12):
        best = facts["tasks"][0]
        return f"{needed_score}: its best task, {best['task']}, gives {best['value']:.4g}."
    return needed_score + "."


def truth(found: Validation | None, label: str, id_: str) -> list[str]:
    """Sentences about what trainings said: of the score, on its first outcome, and of the row that one did without."""
    out = []
    for design in found.designs if found else ():
        first = next((s for s in design.scores if s.label == label and math.isfinite(s.lds.value)), None)
        if first is None:
            continue
        ceiling = next((o.ceiling for o in design.outcomes if o.name == first.outcome), None)
        most = "" if ceiling is None else f"; at most {ceiling:.2f} can be reached"
        out.append(
            f"{label} orders {design.models} trainings ({design.name}) by {first.outcome} at {first.lds.value:+.2f} "
            f"[{first.lds.low:+.2f}, {first.lds.high:+.2f}], 0 being chance{most}."
        )
    for gone in found.left_out if found else ():
        if id_ in gone.ids:
            beside = f" and {len(gone.ids) - 1} more" if len(gone.ids) > 1 else ""
            worth = ", ".join(f"{name} {value:+.2g}" for name, value in gone.worth.items())
            out.append(f"With this row{beside} the trained model is better by: {worth}.")
    return out


def print_explanation(facts: dict[str, Any], console: Console) -> None:
    """Print what `explain` found."""
    where = " · ".join(str(v) for v in (facts["source"], facts["category"]) if v)
    size = f" · {facts['n_tokens']:.0f} {facts['unit']}" if facts["n_tokens"] is not None else ""
    console.print(Text(f"row {facts['id']}", style="bold") + Text(f"  {where}{size}", style="dim"))
    console.print(Text(facts["verdict"]))
    if facts["change"]:
        console.print(Text(facts["change"]))
    for line in facts["truth"]:
        console.print(Text(line))
    for message in facts["messages"]:
        style = "green" if is_learnt(message) else ""
        console.print(Text(f"{message['role']}: ", style="dim") + Text(clip(message["content"], 600), style=style))
    if facts["tasks"]:
        table = Table("task", "part", "rank in task", box=None, pad_edge=False)
        for entry in facts["tasks"]:
            table.add_row(Text(entry["task"]), f"{entry['value']:+.4g}", str(entry["rank"]))
        console.print(table)
    if facts["checkpoints"]:
        names = [name for name in facts["checkpoints"][0] if name != "checkpoint"]
        table = Table("checkpoint", *names, box=None, pad_edge=False)
        for entry in facts["checkpoints"]:
            table.add_row(str(entry["checkpoint"]), *(number(entry.get(name)) for name in names))
        console.print(table)
    plain = {n: v for n, v in facts["parts"].items() if n != "score" and not n.startswith(("task.", "ckpt"))}
    if plain:
        console.print(Text("parts: " + " · ".join(f"{name} {number(value)}" for name, value in plain.items())))
    table = Table("method", "rank", "score", "", box=None, pad_edge=False)
    for entry in facts["methods"]:
        rank = "–" if entry["rank"] is None else f"{entry['rank']:.0f}"
        table.add_row(Text(entry["label"]), rank, number(entry["score"]), "kept" if entry["selected"] else "")
    console.print(table)
    for entry in facts["nearest"]:
        console.print(
            Text(f"like a kept row ({entry['likeness']:.2f}, {entry['id'][:12]}): {entry['text']}", style="dim")
        )


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def clip(text: str, room: int) -> str:
    """A text's beginning, saying how much is left out."""
    return text if len(text) <= room else f"{text[:room]}… ({len(text) - room:,} more characters)"


def write_why(run_dir: Path, *, console: Console | None = None) -> Path:
    """Explain every kept row of every method that a model can explain, into `why.json`.

    Raises:
        KeepsetError: no method here has anything to say, or what it needs is gone.
    """
    data = read_run(Path(run_dir))
    say = (console or Console(stderr=True)).print
    why: dict[str, dict[str, Any]] = {}
    for label, columns in data.columns.items():
        kept = [str(i) for i in data.ids[columns["selected"] > 0] if str(i) in data.messages][:ROWS]
        if not kept:
            continue
        if {"loss_ini", "loss_ref"} <= set(columns):
            say(f"{label}: the tokens of {len(kept)} kept rows, before and after", highlight=False)
            changes = tokens_of_rows(run_dir, kept)
            why[label] = {
                id_: {"tokens": [[t["text"], round(t["before"], 3), round(t["after"], 3)] for t in facts["tokens"]]}
                for id_, facts in changes.items()
            }
        elif data.method_names.get(label) in COSINES:
            say(f"{label}: the validation rows behind {len(kept)} kept rows", highlight=False)
            why[label] = {id_: strongest(facts) for id_, facts in pair_pulls(run_dir, kept, label).items()}
    if not why:
        raise KeepsetError(f"{run_dir}: no method here keeps rows that a model explains (davir, rose, less and kin)")
    return Run(Path(run_dir)).save_json(layout.WHY, why)


def strongest(facts: dict[str, Any]) -> dict[str, Any]:
    """The ends of a row's list of validation rows, and the sentence about doing without them."""
    pairs = facts["pairs"]
    ends = pairs if len(pairs) <= 2 * EACH else [*pairs[:EACH], *pairs[-EACH:]]
    short = [{**p, "value": round(p["value"], 4), "checkpoints": [round(v, 4) for v in p["checkpoints"]]} for p in ends]
    return {"pairs": short, "left_out": len(pairs) - len(ends), "weights": [round(w, 4) for w in facts["weights"]],
            "without": tell_without(facts["without"])}  # fmt: skip
