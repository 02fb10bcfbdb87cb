"""The table of experiments/methods-table from a run folder: cost, agreement and what each method keeps.

Processor seconds are those of the stages that the method needs, each counted in full though others share it; a gradient
pass without the target gradients and curvature solves of other methods that were logged inside it. FLOPs are counted
(`keepset.stages.counts`), as if the method ran alone. Agreement: Spearman's rank correlation over all rows, and the
share of a method's best 5 % that is in another's. Chance overlap is 5 %.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import rankdata

from keepset.methods.gradient import influence_request
from keepset.methods.table import METHODS
from keepset.recipe import MethodSpec
from keepset.runfolder.run import Run
from keepset.stages.counts import selection_work
from keepset.stages.job import Job

BESIDE = ("rose", "less", "davir", "bm25", "rds+", "length")
TOP = 0.05
NESTED = ("target gradients at ", "curvature at ")


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
    found = passes(entries, [w.logged for w in work if w.logged])
    if "gradients" in METHODS[spec.name].needs:
        request = influence_request(spec.name, spec.options)
        found += sum(cpu(e) for e in entries if re.match(rf"target gradients at \S+ \({request.loss}\)", e["stage"]))
        if request.curvature is not None:
            solver = re.escape(request.curvature.solver)
            found += sum(cpu(e) for e in entries if re.match(rf"curvature at \S+ \({solver}\)", e["stage"]))
    return found


def passes(entries: list[dict[str, Any]], patterns: list[str]) -> float:
    """Processor seconds of the stages of some patterns, without what was logged inside a gradient pass."""
    total, inside = 0.0, 0.0
    for e in entries:  # what is nested ends, and is logged, first
        if e["stage"].startswith(NESTED):
            inside += cpu(e)
        elif any(re.fullmatch(p, e["stage"]) for p in patterns):
            total += cpu(e) - (inside if e["stage"].startswith("gradients at ") else 0.0)
        if e["stage"].startswith("gradients at "):
            inside = 0.0
    return total


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
