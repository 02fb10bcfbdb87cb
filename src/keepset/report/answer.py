"""Did choosing help, and what did it cost: the comparison as a sentence for each measure and budget, and as bars.

Every number comes from `comparison.json`; nothing is tested here. Told apart from Random means p < 0.05 after Holm, as
the stars of `keepset compare` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keepset.pipeline.metrics import is_loss, p_of, told, unit_of
from keepset.report.numbers import number
from keepset.runfolder.records import Comparison, Entry, ModelRow, TrainingSet, Versus

CHOICES = ("method", "mix")
SIZED = ("method", "random", "longest", "shortest")
"""Kinds that belong to one budget; the others are held against all."""


@dataclass(frozen=True)
class Measure:
    """How a family of measures is told: its `title`, what is `more` or `less` after a training, on which `items`.

    `scale` is what a mean is multiplied by in a sentence: shares are counted in a hundred, without a unit.
    """

    title: str

    more: str
    less: str
    items: str
    scale: float = 1.0


MEASURES = {
    "margin": Measure(
        "Preference for the right answer", "the model prefers the right answer by {} more",
        "the model prefers the right answer by {} less", "pairs",
    ),
    "accuracy": Measure(
        "Right answer preferred", "the model prefers the right answer in {} more of 100 pairs",
        "the model prefers the right answer in {} fewer of 100 pairs", "pairs", 100.0,
    ),
    "gsm8k.accuracy": Measure(
        "GSM8K questions with the right number", "the model solves {} more of 100 questions",
        "the model solves {} fewer of 100 questions", "questions", 100.0,
    ),
    "loss.heldout": Measure(
        "Loss on held-out rows", "the loss on held-out rows is lower by {}",
        "the loss on held-out rows is higher by {}", "rows",
    ),
    "loss.preference": Measure(
        "DPO's loss of held-out pairs", "the preference loss is lower by {}", "the preference loss is higher by {}",
        "pairs",
    ),
    "loss.chosen": Measure(
        "Loss on the right answers", "the loss on the right answers is lower by {}",
        "the loss on the right answers is higher by {}", "pairs",
    ),
}  # fmt: skip
OTHER = Measure("", "it is better by {}", "it is worse by {}", "items")


def measure_of(name: str) -> Measure:
    """How a measure is told, by the longest family that its name belongs to."""
    families = [family for family in MEASURES if f"{name}.".startswith(f"{family}.")]
    return MEASURES[max(families, key=len)] if families else OTHER


# -- the picture ------------------------------------------------------------------------------------------------------


def plain_label(row: TrainingSet) -> str:
    """A training set's name without its budget; Random's draws are one."""
    return "random" if row.kind == "random" else row.label.split("@")[0]


def bars(comparison: Comparison | None) -> list[dict[str, Any]]:
    """Every training set, its seeds together: size, cost, and of each measure the mean, seeds and test against Random.

    A mean's interval is over held-out items; `spread` is the standard deviation over seeds; `told` is "better", "worse"
    or "" (not told apart).
    """
    if comparison is None:
        return []
    rows: dict[tuple[str, str, str | None], list[ModelRow]] = {}
    for row in comparison.rows:
        rows.setdefault((row.kind, plain_label(row), row.budget), []).append(row)
    out = []
    for entry in comparison.summary:
        seeds = rows.get((entry.kind, plain_label(entry), entry.budget), [])
        measures = {
            name: {
                **{k: number(vars(mean)[k]) for k in ("value", "low", "high", "spread")},
                "seeds": [number(row.metrics[name].value) for row in seeds if name in row.metrics],
                "versus": versus_of(name, entry.vs_random.get(name)),
            }
            for name, mean in entry.metrics.items()
        }
        out.append({
            "label": plain_label(entry), "kind": entry.kind, "control": entry.kind not in CHOICES,
            "budget": entry.budget if entry.kind in SIZED else None, "n_rows": entry.n_rows,
            "n_tokens": entry.n_tokens, "seeds": entry.seeds, "cost": entry.cost.seconds, "measures": measures,
        })  # fmt: skip
    return out


def versus_of(name: str, versus: Versus | None) -> dict[str, Any] | None:
    """The difference to Random with its interval, p (Holm's where it is known), and what it tells."""
    if versus is None:
        return None
    numbers = {k: number(vars(versus)[k]) for k in ("difference", "low", "high")}
    return {**numbers, "p": number(p_of(versus)), "told": told(name, versus)}


# -- the sentence -----------------------------------------------------------------------------------------------------


def answers(comparison: Comparison | None) -> list[dict[str, Any]]:
    """The answer by measure and budget: `help` is "yes", "no", "undecided" or "unknown"; `note` is for the picture."""
    if comparison is None or not comparison.summary:
        return []
    budgets = list(dict.fromkeys(e.budget for e in comparison.summary if e.kind in SIZED)) or [None]
    measures = dict.fromkeys(name for entry in comparison.summary for name in entry.metrics)
    return [
        {
            "budget": budget,
            "measure": name,
            **answer(comparison, name, budget),
            "title": title(comparison, name),
            "note": note(comparison, name, budget),
        }
        for budget in budgets
        for name in measures
    ]


def answer(comparison: Comparison, name: str, budget: str | None) -> dict[str, str]:
    """Whether choosing helped, by one measure at one budget, in words."""
    here = [e for e in comparison.summary if name in e.metrics and (e.kind not in SIZED or e.budget == budget)]
    choices = sorted((e for e in here if e.kind in CHOICES), key=lambda e: -sign_of(name) * e.metrics[name].value)
    if not choices:
        return {"help": "unknown", "sentence": "Not known: no method's choice was trained and measured here."}
    tested = [e for e in choices if name in e.vs_random]
    if not tested:
        best, base = choices[0], next((e for e in here if e.kind == "base"), None)
        reached = f"After training on {rows_of(best)} it is {value_text(best, name)}"
        if base is not None:
            reached += f", before {base.metrics[name].value:.3g}"
        drawn = any(e.kind == "random" for e in here)
        why = ("this measure was not tested against random rows" if drawn
               else "no model was trained on random rows to hold it against (set controls.random_seeds)")  # fmt: skip
        return {"help": "unknown", "sentence": f"Not known: {why}. {reached}."}
    better = [e for e in tested if told(name, e.vs_random[name]) == "better"]
    worse = [e for e in tested if told(name, e.vs_random[name]) == "worse"]
    rival = next((e for e in here if e.kind == "random"), None)
    first = (better or tested)[0]
    said = against_random(first, name, rival)
    if better:
        return {"help": "yes", "sentence": f"Yes: {said}.{length_too(here, first, name)}{others(tested, first, name)}"}
    if len(worse) == len(tested):
        return {"help": "no", "sentence": f"No, it harmed: {said}.{others(tested, first, name)}"}
    items = f"these {first.vs_random[name].n} {measure_of(name).items}"
    power = (comparison.power or {}).get(name)
    seen = ""
    if power is not None and not math.isnan(power.smallest):
        size = amount(power.smallest, name, power.smallest) + (" in 100" if measure_of(name).scale != 1 else "")
        seen = f" In four of five cases they would show a difference of {size}."
    elif power is not None:
        seen = " They are too few to show any difference."
    return {"help": "undecided", "sentence": f"Not that {items} can show: {said}.{seen}{others(tested, first, name)}"}


def sign_of(name: str) -> int:
    """What makes larger better."""
    return -1 if is_loss(name) else 1


def rows_of(entry: Entry) -> str:
    """`rose's 24 rows`."""
    return f"{plain_label(entry)}'s {entry.n_rows:,} rows"


def value_text(entry: Entry, name: str) -> str:
    """A mean with its interval over items."""
    mean = entry.metrics[name]
    return f"{mean.value:.3g} ({mean.low:.3g} to {mean.high:.3g})"


def against_random(entry: Entry, name: str, rival: Entry | None) -> str:
    """What a model trained on a choice does more or less of than one trained on random rows."""
    versus = entry.vs_random[name]
    gain, low, high = (sign_of(name) * v for v in (versus.difference, versus.low, versus.high))
    if is_loss(name):
        low, high = high, low
    does = measure_of(name).more if gain >= 0 else measure_of(name).less
    if gain < 0:
        gain, low, high = -gain, -high, -low
    width = (high - low) / 2
    does = does.format(amount(gain, name, width))
    alike = rival is not None and rival.n_rows == entry.n_rows
    whom = "as many random rows" if alike else "random rows of the same budget"
    if entry.kind == "mix":
        whom = "the mix with random rows"
    if gain == width == 0:
        return f"on every one of them training on {rows_of(entry)} gives the same as training on {whom}"
    return (f"after training on {rows_of(entry)}, {does} than after training on {whom} "
            f"(95\u00a0% interval {plain(low, name, width)} to {plain(high, name, width)})")  # fmt: skip


def amount(value: float, name: str, width: float) -> str:
    """A difference with its unit."""
    unit = "" if measure_of(name).scale != 1 else unit_of(name)
    return f"{plain(value, name, width)} {unit}".strip()


def plain(value: float, name: str, width: float) -> str:
    """A number to one or two digits of `width`, half of its interval."""
    scale = measure_of(name).scale
    digits = 3 if not width > 0 else min(6, max(0, math.ceil(-math.log10(width * scale / 3))))
    text = f"{value * scale:.{digits}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def others(tested: Sequence[Entry], first: Entry, name: str) -> str:
    """What became of the other choices, in a few words."""
    groups: dict[str, list[str]] = {"better": [], "": [], "worse": []}
    for entry in tested:
        if entry is not first:
            groups[told(name, entry.vs_random[name])].append(plain_label(entry))
    ends = {
        "better": "better than random rows too",
        "": "not told apart from random rows",
        "worse": "worse than random",
    }
    said = [f"{listed(names)}: {ends[which]}" for which, names in groups.items() if names]
    return f" {'; '.join(said)}." if said else ""


def listed(names: Sequence[str]) -> str:
    """Names with commas, the first four of them."""
    shown = list(names[:4]) + ([f"{len(names) - 4} more"] if len(names) > 4 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def length_too(here: Sequence[Entry], first: Entry, name: str) -> str:
    """That the control by length does as well, where it does: then length alone may be what helps."""
    for entry in here:
        if entry.kind in ("longest", "shortest") and name in entry.vs_random:
            one, two = entry.vs_random[name].difference, first.vs_random[name].difference
            if told(name, entry.vs_random[name]) == "better" and sign_of(name) * (one - two) >= 0:
                return f" But the {entry.kind} rows do no worse, so length alone may be what helps."
    return ""


def title(comparison: Comparison, name: str) -> str:
    """What a picture shows, in plain words, with the unit and the number of items; "" for a measure of no family."""
    measure, mean = measure_of(name), next(e.metrics[name] for e in comparison.summary if name in e.metrics)
    if not measure.title:
        return ""
    alone = ", gained over the untrained model" if ".implicit" in name else ""
    of = name.partition(".of.")[2]
    which = (f" of {of}" if of else "") + (" of like length" if name.endswith(".matched") else "")
    return f"{measure.title}{alone} ({unit_of(name) or 'mean'}, {mean.n:,} held-out {measure.items}{which})"


def note(comparison: Comparison, name: str, budget: str | None) -> str:
    """What dot, line and band of the picture are."""
    random = next((e for e in comparison.summary if e.kind == "random" and e.budget == budget), None)
    tests = sum(name in e.vs_random for e in comparison.summary)
    if random is None or not tests:
        return "Dot: the mean. Line: its 95\u00a0% interval over held-out items."
    spread = random.metrics[name].spread if name in random.metrics else None
    drawn = ("Random was drawn once, so its own spread is not known." if spread is None else
             f"Dashed: the mean of {random.seeds} random draws; band: their standard deviation.")  # fmt: skip
    corrected = f" after correcting for {tests} comparisons (Holm)" if tests > 1 else ""
    return (f"Dot: the mean. Line: 95\u00a0% interval of its difference to random rows. {drawn} "
            f"Better, worse: p < 0.05{corrected}.")  # fmt: skip


# -- the price --------------------------------------------------------------------------------------------------------


def prices(comparison: Comparison | None, logged: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """What choosing cost by method: operations over those of one training on the whole pool, and seconds as logged.

    Args:
        comparison: of the run; without one there are only seconds.
        logged: entries of `costs.jsonl`.
        labels: the scored methods.

    Returns:
        `methods`: label, share (None: not known), seconds of choosing, seconds of one training on the choice;
        `share` and `seconds`: of all methods together, what they share counted once.
    """
    entries = {plain_label(e): e for e in reversed(comparison.summary if comparison else ()) if e.kind == "method"}
    full = comparison.full_training_flops if comparison else math.nan
    methods = []
    for label in labels:
        entry = entries.get(label)
        spent = [float(e["seconds"]) for e in logged if e["stage"] == f"score {label}"]
        methods.append({
            "label": label, "share": number(entry.cost.select_flops / full) if entry and full > 0 else None,
            "seconds": number(entry.cost.select_seconds if entry else sum(spent)) if entry or spent else None,
            "training": number(entry.cost.train_seconds) if entry else None,
        })  # fmt: skip
    whole = comparison.selection if comparison and comparison.summary else None
    return {"methods": methods, "share": number(whole.share) if whole else None,
            "seconds": number(whole.seconds) if whole else None}  # fmt: skip
