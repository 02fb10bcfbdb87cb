"""DavIR and the shortest rows against Random, and DavIR against the shortest rows, at each size.

python experiments/davir-sweep/table.py --run runs/davir-sweep [--out results/sweep.json]

Differences are of the held-out loss (nats a token, mean over rows), paired over the held-out rows, each side's items
averaged over its seeds; Holm over the sizes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from keepset.evaluate.statistics import holm, paired_test
from keepset.runfolder.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/davir-sweep"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = Run(options.run)
    subsets = run.load_json("subsets.json")
    losses = {n: losses_of(options.run, n) for n in subsets}
    sizes = list(dict.fromkeys(s["budget"] for s in subsets.values()))
    rows = []
    for size in sizes:
        names = {kind: [n for n, s in subsets.items() if s["budget"] == size and s["label"].startswith(kind)]
                 for kind in ("davir", "shortest", "random")}  # fmt: skip
        seeds = {kind: np.concatenate([losses[n] for n in some]) for kind, some in names.items()}
        mean = {kind: values.mean(axis=0) for kind, values in seeds.items()}
        rows.append({
            "size": size, "rows": len(subsets[names["davir"][0]]["ids"]),
            "tokens": {k: round(float(np.mean([subsets[n]["n_tokens"] for n in some]))) for k, some in names.items()},
            "loss": {k: round(float(v.mean()), 4) for k, v in mean.items()},
            "spread": {k: round(float(v.mean(axis=1).std(ddof=1)), 4) for k, v in seeds.items()},
            **{f"{a} less {b}": paired_test(mean[a], mean[b]).as_dict()
               for a, b in (("davir", "random"), ("shortest", "random"), ("davir", "shortest"))},
        })  # fmt: skip
    tests = [k for k in rows[0] if " less " in k]
    for test in tests:
        for row, p in zip(rows, holm([r[test]["p"] for r in rows]), strict=True):
            row[test]["p_holm"] = float(p)
    base = float(losses_of(options.run, "base").mean())
    print(f"base: {base:.3f}\n\n| size | rows | tokens: DavIR, shortest, Random | DavIR | shortest | Random "
          f"| {' | '.join(tests)} |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for r in rows:
        told = " | ".join(difference(r[t]) for t in tests)
        figures = " | ".join(f"{r['loss'][k]:.3f} ±{r['spread'][k]:.3f}" for k in ("davir", "shortest", "random"))
        tokens = ", ".join(str(r["tokens"][k]) for k in ("davir", "shortest", "random"))
        print(f"| {r['size']} | {r['rows']} | {tokens} | {figures} | {told} |")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"base": round(base, 4), "sizes": rows}, indent=1) + "\n")


def difference(test: dict[str, float]) -> str:
    """`-0.034 (-0.059 to -0.015), p 0.001`."""
    p = "< 0.001" if test["p_holm"] < 0.001 else f"{test['p_holm']:.3f}"
    return f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f}), p {p}"


def losses_of(run: Path, name: str) -> np.ndarray:
    """Mean losses (seeds, rows) of the held-out rows under a subset's models."""
    folders = [run / "evaluation/base"] if name == "base" else sorted((run / "evaluation").glob(f"{name}-seed*"))
    items = [load_file(str(f / "items.safetensors")) for f in folders]
    return np.stack([i["row.nll"] / i["row.n_tokens"] for i in items])


if __name__ == "__main__":
    main()
