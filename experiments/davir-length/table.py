"""The length table of the runs named on the command line, and the invariances on their real losses.

    python experiments/davir-length/table.py runs/davir-length/alpaca runs/davir-length/gsm8k ...

Reads what `keepset run` wrote (`scores/`) and writes `results/length.json` beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from keepset.evaluate.statistics import correlations
from keepset.methods.davir import davir, davir_ref, rho
from keepset.runfolder.run import Run
from keepset.selection.ranking import rank_order

LABELS = {"RHO sum": "rho-sum", "RHO mean": "rho-mean", "DavIR": "davir", "DavIR, no end of turn": "davir-content"}


def main() -> None:
    results = {}
    print("| run | rows | score | Spearman | Pearson | answer tokens | kept at 5 % | kept at 10 % |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in sys.argv[1:]:
        run = Run(folder)
        columns = run.load_table("scores/davir.parquet").to_pydict()
        ids, n = np.array(columns["id"]), np.array(columns["n_tokens"])
        ini, ref = np.array(columns["loss_ini"]), np.array(columns["loss_ref"])
        entry: dict[str, Any] = {"rows": len(ids), "mean_tokens": round(float(n.mean()), 2), "scores": {}}
        entry["gain_per_token"] = round(float((ini - ref).sum() / n.sum()), 4)
        entry["base_loss_per_token_with_length"] = round(correlations(ini / n, n).spearman, 3)
        for name, label in LABELS.items():
            if not (run.path / f"scores/{label}.parquet").exists():
                continue
            score = np.array(run.load_table(f"scores/{label}.parquet")["score"].to_pylist())
            link, order = correlations(score, n), rank_order(score, ids)
            kept = [round(float(n[order[: max(1, int(share * len(n)))]].mean()), 1) for share in (0.05, 0.1)]
            entry["scores"][label] = {"spearman": round(link.spearman, 3), "pearson": round(link.pearson, 3),
                                      "kept_tokens_5": kept[0], "kept_tokens_10": kept[1]}  # fmt: skip
            figures = f"{link.spearman:+.2f} | {link.pearson:+.2f} | {n.mean():.1f} | {kept[0]} | {kept[1]}"
            print(f"| {Path(folder).name} | {len(n)} | {name} | {figures} |")
        entry["invariances"] = invariances(ini, ref, n, ids)
        results[Path(folder).name] = entry
    out = Path(__file__).parent / "results" / "length.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, entry in results.items():
        print(f"{name}: {entry['invariances']}")


def invariances(ini: np.ndarray, ref: np.ndarray, n: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """Mean or sum, one denominator or the other: what must not matter to DavIR, and does to RHO."""
    top = max(1, len(n) // 10)
    by_sum, by_mean = davir(ini, ref), davir(ini / n, ref / n)
    orders = [rank_order(s, ids) for s in (by_sum, davir_ref(ini, ref))]
    tops = [set(rank_order(s, ids)[:top]) for s in (rho(ini, ref), rho(ini, ref, n, form="mean"))]
    return {
        "davir_sum_over_mean_largest_difference": float(f"{np.abs(by_sum - by_mean).max():.1e}"),
        "davir_and_davir_ref_rank_alike": bool((orders[0] == orders[1]).all()),
        "rho_sum_and_mean_share_of_top_tenth": round(len(tops[0] & tops[1]) / top, 3),
    }


if __name__ == "__main__":
    main()
