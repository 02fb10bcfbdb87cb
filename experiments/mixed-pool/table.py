"""Print what training on each choice gave, from a run's `comparison.json`: two Markdown tables.

python experiments/mixed-pool/table.py runs/mixed-pool-hidden [--out results/comparison-hidden.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BY_TASK = "accuracy.policy_mean.of."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    summary = json.loads((options.run / "comparison.json").read_text())["summary"]
    print("| trained on | rows | tokens | accuracy, like length | accuracy, all | implicit margin, like length "
          "| loss of chosen | less Random's | p (Holm) |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for entry in summary:
        m, test = entry["metrics"], entry["vs_random"].get("loss.chosen")
        less = f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})" if test else "–"
        print(f"| {name_of(entry)} | {entry['n_rows'] or '–'} | {entry['n_tokens'] or '–'} "
              f"| {interval(m['accuracy.policy_mean.matched'])} | {interval(m['accuracy.policy_mean'])} "
              f"| {interval(m['margin.implicit_mean.matched'], 3)} | {m['loss.chosen']['value']:.3f} | {less} "
              f"| {chance(test['p_holm']) if test else '–'} |")  # fmt: skip
    tasks = sorted(k.removeprefix(BY_TASK) for k in summary[0]["metrics"] if k.startswith(BY_TASK))
    print(f"\n| trained on | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}")
    for entry in summary:
        print(f"| {name_of(entry)} | {' | '.join(interval(entry['metrics'][BY_TASK + t]) for t in tasks)} |")
    if options.out:
        options.out.write_text(json.dumps({"summary": summary}, indent=1) + "\n")


def name_of(entry: dict[str, Any]) -> str:
    """The label, and how many seeds it stands for."""
    return f"{entry['label']} x{entry['seeds']}" if entry["seeds"] > 1 else entry["label"]


def interval(found: dict[str, float], decimals: int = 2) -> str:
    """`0.62 (0.42 to 0.83)`; the spread over seeds where there are several."""
    spread = f" ±{found['spread']:.{decimals}f}" if found.get("spread") is not None else ""
    return f"{found['value']:.{decimals}f}{spread} ({found['low']:.{decimals}f} to {found['high']:.{decimals}f})"


def chance(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


if __name__ == "__main__":
    main()
