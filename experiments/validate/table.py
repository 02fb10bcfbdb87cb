"""Print results/bank.json as the README's table, and what differs beyond the halves' chance: `python table.py`.

A score's interval says how far it is from 0. Two scores of one bank are judged by the same halves and queries, so their
difference is less uncertain than either: it is taken over the same resampled halves and queries (2,000 times), from
the outcomes and scores that the run folder holds (`--run`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTCOMES = {
    "loss.target": "target's loss", "loss.target.preference": "target's DPO loss", "loss.heldout": "held-out rows' loss",
    "loss.chosen": "held-out pairs: loss of chosen", "loss.preference": "DPO loss",
}  # fmt: skip


def cell(lds: dict[str, Any], best: float) -> str:
    """`+0.45 [+0.14, +0.67]`, the best of a column in bold."""
    value = f"{lds['value']:+.2f}"
    return f"{f'**{value}**' if lds['value'] == best else value} [{lds['low']:+.2f}, {lds['high']:+.2f}]"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=HERE / "results/bank.json")
    given = options.parse_args()
    found = json.loads(given.results.read_text(encoding="utf-8"))
    prices = json.loads(given.results.with_name(f"{given.results.stem}-prices.json").read_text(encoding="utf-8"))
    training = prices.pop("one training on the pool")
    (halves,) = (d for d in found["designs"] if d["name"] == "halves")
    table: dict[str, dict[str, Any]] = {}
    for score in halves["scores"]:
        if score["outcome"] in OUTCOMES and score["lds"]:
            table.setdefault(score["label"], {})[score["outcome"]] = score["lds"]
    print("| score | " + " | ".join(OUTCOMES.values()) + " | price |")
    print("|---" * (len(OUTCOMES) + 2) + "|")
    ceilings = {o["name"]: o for o in halves["outcomes"]}
    for name, of in {"two seeds agree": "between_seeds", "ceiling": "ceiling"}.items():
        values = [ceilings[o][of] for o in OUTCOMES]
        print(f"| *{name}* | " + " | ".join(
            f"{v:.2f}" if isinstance(v, float) else f"{v['value']:+.2f} [{v['low']:+.2f}, {v['high']:+.2f}]"
            for v in values) + " | |")  # fmt: skip
    best = {o: max(row[o]["value"] for row in table.values()) for o in OUTCOMES}
    for label, row in sorted(table.items(), key=lambda item: -item[1]["loss.target.preference"]["value"]):
        cells = [cell(row[o], best[o]) for o in OUTCOMES]
        print(f"| `{label}` | " + " | ".join(cells) + f" | {prices.get(label, 0) / training:.2f} |")


if __name__ == "__main__":
    main()
