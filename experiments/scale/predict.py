"""Hold `keepset plan --gpus ... --like` against the measured runs: rates of one size, seconds of a larger one.

For each method, what the run at one size wrote into `costs.jsonl` (seconds of the processor) gives the rates, the pool
of 10,000 rows stands for the larger one (`--rows`), and the plan's steps are added up by share. `start` is measured: a
plan takes 10 s a process. Prints predicted / measured; `--out` keeps it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from run import DATA, HERE, METHODS, OUT, SETTINGS, TEXT
from table import START, parts, sizes_of

from keepset.pipeline.cluster import Cluster
from keepset.pipeline.plan_cluster import plan_cluster
from keepset.recipe import parse_recipe

WHERE = {"start": "reading", "trainings": "training", "passes": "passes", "target": "passes", "text": "formula"}
MIN_SHARE = 0.02


def predicted(method: str, run: dict[str, Any], rows: int, folder: Path) -> dict[str, float]:
    """Seconds by share of a method at a size, from the rates of a measured run."""
    entries = [{**entry, "seconds": entry["cpu_seconds"]} for entry in run["stages"]]
    (folder / "costs.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    recipe = parse_recipe(
        {
            **SETTINGS,
            "run_dir": str(folder / "none"),
            "model": {**SETTINGS["model"], "model_name_or_path": str(DATA / "model")},
            "pool": str(DATA / "pool-10000.jsonl"),
            "target": str(DATA / "target.jsonl"),
            "methods": [method],
        }
    )
    quiet = Console(quiet=True)
    plan = plan_cluster(recipe, Cluster("cpu"), rows=rows, like=folder, console=quiet)
    seconds = dict.fromkeys(("reading", "training", "passes"), 0.0)
    for step in plan["steps"]:
        if step["phase"] in ("start", "trainings", "target", "passes") and not step["stage"].startswith("start"):
            seconds[WHERE[step["phase"]]] += step["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "predicted.json")
    args = parser.parse_args()
    runs = json.loads(OUT.read_text())["runs"]
    rows: list[dict[str, Any]] = []
    print("| | rates of | rows | reading and encoding | training | passes | all three |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for method in (m for m in METHODS if m not in (*TEXT, "encoding") and m in runs):
            sizes = sizes_of(runs[method])
            for small, large in zip(sizes, sizes[1:], strict=False):
                ours = predicted(method, runs[method][small], int(large), Path(made))
                begin, end = parts(runs[method][START]), parts(runs[method][large])
                theirs = {"reading": end["reading"] - begin["reading"], **{k: end[k] for k in ("training", "passes")}}
                ratio = {k: ours[k] / theirs[k] if theirs[k] > MIN_SHARE * sum(theirs.values()) else None for k in ours}
                ratio["all"] = sum(ours.values()) / sum(theirs.values())
                rows.append({"method": method, "from": int(small), "to": int(large), "ratio": ratio, "seconds": ours})
                cells = ["–" if v is None else f"{v:.2f}" for v in ratio.values()]
                print(f"| `{method}` | {int(small):,} | {int(large):,} | " + " | ".join(cells) + " |", flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
