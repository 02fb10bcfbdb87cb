"""What share of each category a run of this recipe keeps, without and with quotas.

python experiments/davir-imbalance/table.py --run runs/davir-imbalance [--out results/shares.json]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from keepset.runfolder.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/davir-imbalance"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    first = Run(options.run)
    scores = first.load_table("scores/davir.parquet").to_pydict()
    category = dict(zip(scores["id"], scores["category"], strict=True))
    pool = Counter(category.values())
    order = [name for name, _ in pool.most_common()]
    found: dict[str, Any] = {"pool": pool}
    print(f"| method | quota | kept | {' | '.join(order)} |\n|---|---|---|{'---|' * len(order)}")
    print(f"| the pool | – | {pool.total()} | {cells(pool, order)} |")
    folders = {"none": options.run} | {p.name: p for p in sorted((options.run / "variants").iterdir())}
    for quota, folder in folders.items():
        for name, subset in Run(folder).load_json("subsets.json").items():
            kept = Counter(category[i] for i in subset["ids"])
            found[f"{name}, {quota}"] = kept
            print(f"| {name} | {quota} | {kept.total()} | {cells(kept, order)} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def cells(counts: Counter[str], order: list[str]) -> str:
    """Rows and share of each category."""
    return " | ".join(f"{counts[name]} ({100 * counts[name] / counts.total():.0f} %)" for name in order)


if __name__ == "__main__":
    main()
