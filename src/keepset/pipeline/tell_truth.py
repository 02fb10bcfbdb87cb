"""`validation.json` as one readable table: every score beside the noise ceiling, outcome by outcome."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.runfolder.records import Mean
from keepset.runfolder.truth import Design, Validation

HEADINGS = {
    "loss.target": "target\nloss", "loss.target.preference": "target\nDPO loss", "loss.heldout": "held-out\nloss",
    "loss.chosen": "pairs:\nchosen", "loss.preference": "pairs:\nDPO loss",
    "margin.implicit_mean.matched": "pairs:\nmargin", "accuracy.policy_mean.matched": "pairs:\naccuracy",
    "gsm8k.accuracy": "GSM8K\nexact",
}  # fmt: skip
"""Of the columns; pairs are the held-out ones, margin and accuracy those of like length."""
WHAT = {
    "halves": "{models} trainings on random halves of {rows} rows",
    "leave-out": "{models} trainings, on {rows} rows and with some left out",
}
VIEWS = "averaged over queries", "of the mean over queries"
PERFECT = "a perfect score"
CELL = 12
"""Columns that an outcome takes."""


def print_validation(result: Validation, console: Console) -> None:
    """Print every design and the tenths."""
    for design in result.designs:
        print_design(design, result.rows, console)
    labels = list(dict.fromkeys(one.label for one in result.deciles))
    for outcomes in fitting([one.outcome for one in result.deciles], labels, console):
        table = new_table("tenths of", outcomes)
        for label in labels:
            found = {one.outcome: one for one in result.deciles if one.label == label}
            table.add_row(label, *(f"{signed(found[o].spearman)}\n{chance(found[o].p)}" for o in outcomes))
        console.print(table)
    if result.deciles:
        console.print(
            "Spearman of a tenth's place and of what training on it gives; + where\nbetter-scored tenths do better.",
            highlight=False,
        )
    for label, n in result.unscored.items():
        console.print(f"{label}: {n} of {result.rows} rows have no score and count as its mean", highlight=False)


def print_design(design: Design, rows: int, console: Console) -> None:
    """A line a score, a column an outcome, the ceiling first; by query, and of the mean over queries."""
    labels = list(dict.fromkeys(score.label for score in design.scores))
    console.print(WHAT[design.name].format(models=design.models, rows=rows), highlight=False)
    for whole, view in enumerate(VIEWS):
        console.print(f"\nSpearman of summed scores and outcome, {view}:", highlight=False)
        for names in fitting([o.name for o in design.outcomes], [*labels, PERFECT], console):
            table, outcomes = new_table("score", names), [o for o in design.outcomes if o.name in names]
            if design.again:
                ceilings = [o.ceiling_of_mean if whole else o.ceiling for o in outcomes]
                table.add_row(PERFECT, *("–" if c is None else signed(c) for c in ceilings))
                agree = [o.between_seeds_of_mean if whole else o.between_seeds for o in outcomes]
                table.add_row("two seeds agree", *("–" if a is None else interval(a) for a in agree), end_section=True)
            for label in labels:
                found = {s.outcome: s.of_mean if whole else s.lds for s in design.scores if s.label == label}
                table.add_row(label, *(interval(found[name]) for name in names))
            console.print(table)
    console.print(
        "below: 95 % interval over trainings and queries. 0: an order by chance;\n"
        "+: rows of high score make the outcome better. pairs: the held-out ones,\n"
        "margin and accuracy on those of like length. a perfect score: √ of how far\n"
        "two seeds of one half agree, which is all that one training can show.",
        highlight=False,
    )


def fitting(outcomes: list[str], labels: list[str], console: Console) -> list[list[str]]:
    """The outcomes, each once, in as many parts as the terminal is too narrow for."""
    names = list(dict.fromkeys(outcomes))
    each = max(1, (console.width - max(map(len, labels), default=0) - 3) // CELL)
    return [names[start : start + each] for start in range(0, len(names), each)]


def new_table(first: str, outcomes: list[str]) -> Table:
    """An empty table with a column an outcome."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in outcomes:
        table.add_column(HEADINGS[name], justify="right", no_wrap=True)
    return table


def signed(value: float) -> str:
    """`+0.31`, or a dash where there is no number."""
    return "–" if value != value else f"{value:+.2f}"


def chance(p: float) -> str:
    """`p .03`, or that it is below what three digits can say."""
    return "–" if p != p else "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def interval(mean: Mean) -> str:
    """The value over its interval."""
    return f"{signed(mean.value)}\n{signed(mean.low)} {signed(mean.high)}"
