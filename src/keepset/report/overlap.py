"""`keepset overlap`: the scores of several run folders, and their agreement as tables."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from keepset.runfolder import layout
from keepset.runfolder.records import Agreement
from keepset.runfolder.run import Run


def stored_scores(place: str) -> pa.Table:
    """The scores table of `RUN_DIR` (its first method) or `RUN_DIR:LABEL`.

    Raises:
        KeepsetError: no such folder, or no such label in it.
    """
    folder, _, label = place.rpartition(":") if ":" in place else (place, "", "")
    if not (Path(folder) / layout.RECIPE).exists():  # a Windows path, or a folder with a colon in its name
        folder, label = place, ""
    run = Run(folder)
    methods = run.recipe().methods
    return run.load_table(layout.scores(label or methods[0].label))


def print_agreement(result: Agreement, console: Console) -> None:
    """Print each scoring's length figures and every pair's agreement."""
    sizes = list(result.sizes)
    about = table_of("scoring", "mean score", "with length", *(f"tokens kept at {s}" for s in sizes))
    for name, facts in result.scorings.items():
        kept = (f"{facts.mean_tokens_kept[s]:.1f}" for s in sizes)
        about.add_row(name, f"{facts.mean:+.4f}", f"{facts.length_spearman:+.2f}", *kept)
    console.print(about)
    pairs = table_of("scorings", "Spearman", *(f"overlap of the top {s}" for s in sizes))
    for pair in result.pairs:
        overlap = (f"{pair.overlap[s]:.2f}" for s in sizes)
        pairs.add_row(f"{pair.a} / {pair.b}", f"{pair.spearman:+.3f}", *overlap)
    pairs.add_row("two random rankings", "0", *(f"{result.chance[s]:.2f}" for s in sizes))
    console.print(pairs)
    console.print(f"{result.n} rows that all have scored; with length: Spearman with the answer's tokens.",
                  highlight=False)  # fmt: skip


def table_of(first: str, *others: str) -> Table:
    """An empty table, numbers to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
