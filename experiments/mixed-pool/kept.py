"""Print what each method of a run kept, by source, and how well its score tells the hidden rows from the rest.

python experiments/mixed-pool/kept.py --run runs/mixed-pool-hidden [--out results/kept.json]

A pool without hidden rows has no AUROC.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

from keepset.runfolder.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run, found = Run(options.run), {}
    for name, subset in run.load_json("subsets.json").items():
        table = run.load_table(f"scores/{subset['label']}.parquet").to_pydict()
        found[name] = facts(table, set(subset["ids"]))
    print("| | hidden of kept | AUROC | Spearman with length | kept |\n|---|---|---|---|---|")
    for name, f in found.items():
        kept = ", ".join(f"{k} {n}" for k, n in f["kept"].items())
        auroc = "–" if f["auroc"] is None else f"{f['auroc']:.3f}"
        total = sum(f["kept"].values())
        print(f"| {name} | {f['kept'].get('hidden', 0)} of {total} | {auroc} | {f['length']:+.2f} | {kept} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def facts(table: dict, kept: set[str]) -> dict:
    """Counts by source, the AUROC of the hidden rows and the correlation with length; unscored rows are last."""
    source = np.array(table["source"])
    score = np.array([-np.inf if s is None else s for s in table["score"]])
    hidden, ranks = source == "hidden", rankdata(score)
    n = int(hidden.sum())
    above = ranks[hidden].sum() - n * (n + 1) / 2  # pairs of a hidden and another row, the hidden one first
    return {
        "auroc": float(above / (n * (len(source) - n))) if n else None,
        "length": float(spearmanr(ranks, table["n_tokens"]).statistic),
        "momentum": float(np.median(table["ckpt0.momentum"])) if "ckpt0.momentum" in table else None,
        "kept": dict(Counter(str(s) for s, i in zip(source, table["id"], strict=True) if i in kept).most_common()),
    }


if __name__ == "__main__":
    main()
