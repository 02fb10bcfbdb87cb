"""Print results/bank.json as the README's table: `python table.py`; `--all` with every variant."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = {
    "target's loss": ("loss.target", "lds"), "target's DPO loss": ("loss.target.preference", "lds"),
    "the same, mean over pairs": ("loss.target.preference", "of_mean"), "held-out rows' loss": ("loss.heldout", "lds"),
    "held-out pairs: loss of chosen": ("loss.chosen", "lds"), "DPO loss": ("loss.preference", "lds"),
}  # fmt: skip
CEILINGS = {
    "two seeds agree": {"lds": "between_seeds", "of_mean": "between_seeds_of_mean"},
    "ceiling, √ of that": {"lds": "ceiling", "of_mean": "ceiling_of_mean"},
}
SHOWN = ("rose-query", "less-query", "metagradient-sft", "rose-mean", "less-sgd")
"""Variants that are shown among the methods."""


def cell(value: Any, best: float | None = None) -> str:
    """`+0.45 [+0.14, +0.67]`, the best of a column in bold; a ceiling without an interval."""
    if not isinstance(value, dict):
        return f"{value:.2f}"
    text = f"{value['value']:+.2f}"
    return f"{f'**{text}**' if value['value'] == best else text} [{value['low']:+.2f}, {value['high']:+.2f}]"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=HERE / "results/bank.json")
    options.add_argument("--all", action="store_true")
    given = options.parse_args()
    found = json.loads(given.results.read_text(encoding="utf-8"))
    prices = json.loads(given.results.with_name(f"{given.results.stem}-prices.json").read_text(encoding="utf-8"))
    training = prices.pop("one training on the pool")
    (halves,) = (d for d in found["designs"] if d["name"] == "halves")
    outcomes = {o["name"]: o for o in halves["outcomes"]}
    table: dict[str, dict[str, Any]] = {}
    for score in halves["scores"]:
        for column, (outcome, kind) in COLUMNS.items():
            if score["outcome"] == outcome and (given.all or "-" not in score["label"] or named(score["label"])):
                table.setdefault(score["label"], {})[column] = score[kind]
    print("| score | " + " | ".join(COLUMNS) + " | price |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, kinds in CEILINGS.items():
        print(f"| *{name}* | " + " | ".join(cell(outcomes[o][kinds[kind]]) for o, kind in COLUMNS.values()) + " | |")
    best = {column: max(row[column]["value"] for row in table.values()) for column in COLUMNS}
    for label, row in sorted(table.items(), key=lambda item: -item[1]["the same, mean over pairs"]["value"]):
        cells = [cell(row[column], best[column]) for column in COLUMNS]
        print(f"| `{label}` | " + " | ".join(cells) + f" | {prices.get(label, 0) / training:.2f} |")


def named(label: str) -> bool:
    """Whether a label with a hyphen is a method's own name, a draw of chance, or a variant that is shown."""
    from keepset.methods.table import METHODS

    return label in METHODS or label in SHOWN or label.startswith("chance-")


if __name__ == "__main__":
    main()
