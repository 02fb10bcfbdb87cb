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
    "halves": "{models} trainings on random halves of {rows} rows: Spearman of summed scores and outcome",
    "leave-out": "{models} trainings, all of {rows} rows and with some left out: Spearman of summed scores and outcome",
}


def print_validation(result: Validation, console: Console) -> None:
    """Print every design and the tenths."""
    for design in result.designs:
        print_design(design, result.rows, console)
    if result.deciles:
        outcomes = list(dict.fromkeys(one.outcome for one in result.deciles))
        table = new_table("tenths of", outcomes)
        for label in dict.fromkeys(one.label for one in result.deciles):
            found = {one.outcome: one for one in result.deciles if one.label == label}
            table.add_row(label, *(f"{signed(found[o].spearman)}\np {found[o].p:.3f}" for o in outcomes))
        console.print(table)
        console.print(
            "Spearman of a tenth's place and of what training on it gives; + where better-scored tenths do better.",
            highlight=False,
        )
    for label, n in result.unscored.items():
        console.print(f"{label}: {n} of {result.rows} rows have no score and count as its mean", highlight=False)


def print_design(design: Design, rows: int, console: Console) -> None:
    """One table: a line a score, a column an outcome; the ceiling first."""
    outcomes = [o.name for o in design.outcomes]
    table = new_table("score", outcomes)
    ceilings = ["–" if o.ceiling is None else signed(o.ceiling) for o in design.outcomes]
    agree = ["–" if o.between_seeds is None else interval(o.between_seeds) for o in design.outcomes]
    if any(o.ceiling is not None for o in design.outcomes):
        table.add_row("a perfect score", *ceilings)
        table.add_row("two seeds agree", *agree, end_section=True)
    for label in dict.fromkeys(score.label for score in design.scores):
        found = {score.outcome: score for score in design.scores if score.label == label}
        table.add_row(label, *(interval(found[outcome].lds) for outcome in outcomes))
    console.print(
        WHAT[design.name].format(models=design.models, rows=rows) + ", averaged over queries", highlight=False
    )
    console.print(table)
    console.print(
        "below: 95 % interval over trainings and queries. 0: an order by chance; +: rows of\n"
        "high score make the outcome better. pairs: the held-out ones, margin and accuracy on\n"
        "those of like length. a perfect score: √ of how far two seeds of one half agree,\n"
        "which is all that one training can show.",
        highlight=False,
    )


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


def interval(mean: Mean) -> str:
    """The value over its interval."""
    return f"{signed(mean.value)}\n{signed(mean.low)} {signed(mean.high)}"
