"""The table of experiments/methods-table from a run folder: cost, agreement and what each method keeps.

Processor seconds are those of the stages that the method needs, each counted in full though others share it. FLOPs are
counted (`keepset.pipeline.price`), as if the method ran alone. Agreement: Spearman's rank correlation over all rows,
and the share of a method's best 5 % that is in another's. Chance overlap is 5 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import rankdata

from keepset.pipeline.price import selection_work
from keepset.recipe import MethodSpec
from keepset.runfolder.run import Run
from keepset.stages.job import Job

BESIDE = ("rose", "less", "davir", "bm25", "rds+", "length")
TOP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/methods-table"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "table.json")
    args = parser.parse_args()
    run = Run(args.run_dir)
    job = Job(run.recipe(), console=Console(quiet=True))
    tables = {m.label: run.load_table(f"scores/{m.label}.parquet") for m in job.recipe.methods
              if (run.path / f"scores/{m.label}.parquet").exists()}  # fmt: skip
    labels = list(tables)
    scores = np.stack([t["score"].to_numpy(zero_copy_only=False) for t in tables.values()])
    source = np.array(next(iter(tables.values()))["source"].to_pylist())
    top = np.stack([kept(t["rank"].to_numpy(zero_copy_only=False)) for t in tables.values()])
    ranks = np.stack([rankdata(s) for s in scores])
    result: dict[str, Any] = {
        "rows": len(source),
        "kept": int(top[0].sum()),
        "sources": sorted(set(source)),
        "tokens": int(sum(len(r.input_ids) for r in job.rows)),
        "methods": {
            m.label: {
                "cpu_seconds": round(seconds_of(job, m), 1),
                "tflop": round(sum(w.flops for w in selection_work(job, [m])) / 1e12, 2),
                "shares": {s: round(float((source[t > 0] == s).mean()), 3) for s in sorted(set(source))},
            }
            for m, t in zip([m for m in job.recipe.methods if m.label in tables], top, strict=True)
        },
        "labels": labels,
        "spearman": np.corrcoef(ranks).round(3).tolist(),
        "overlap": ((top @ top.T) / top.sum(1)[:, None]).round(3).tolist(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(markdown(result))


def kept(rank: np.ndarray) -> np.ndarray:
    """(n,) int: the best 5 %."""
    return (rank <= max(1, round(TOP * len(rank)))).astype(int)


def seconds_of(job: Job, spec: MethodSpec) -> float:
    """Processor seconds of a method's stages."""
    entries = job.run.costs()
    work = selection_work(job, [spec])
    if not work:
        return sum(cpu(e) for e in entries if e["stage"] == f"score {spec.label}")
    return sum(cpu(e) for e in entries if any(w.logged(e) for w in work))


def cpu(entry: dict[str, Any]) -> float:
    """An entry's processor seconds."""
    return float(entry["cpu_seconds"])


def markdown(result: dict[str, Any]) -> str:
    """Three tables."""
    labels, sources = result["labels"], result["sources"]
    beside = [b for b in BESIDE if b in labels]
    lines = [f"| method | CPU s | TFLOP | {' | '.join(sources)} |", "|---|---|---|" + "---|" * len(sources)]
    for label in labels:
        m = result["methods"][label]
        shares = " | ".join(f"{100 * m['shares'][s]:.0f} %" for s in sources)
        lines.append(f"| `{label}` | {m['cpu_seconds']:.0f} | {m['tflop']:.1f} | {shares} |")
    head = " | ".join(f"`{b}`" for b in beside)
    lines += ["", f"| Spearman; overlap of the best 5 % | {head} | nearest |", "|---|" + "---|" * (len(beside) + 1)]
    for i, label in enumerate(labels):
        cells = []
        for b in beside:
            j = labels.index(b)
            own = "–" if i == j else f"{result['spearman'][i][j]:+.2f}; {100 * result['overlap'][i][j]:.0f} %"
            cells.append(own)
        near = max((j for j in range(len(labels)) if j != i), key=lambda j: result["spearman"][i][j])
        cells.append(f"`{labels[near]}` {result['spearman'][i][near]:+.2f}")
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
