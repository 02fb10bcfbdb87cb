"""DavIR with a reference from 10, 25 and 50 % of the pool, three draws each, against the one from all of it.

    python experiments/davir-fraction/run.py [recipe.yaml]

Every scoring is a run folder of its own beside the recipe's; the base's losses are computed once and copied. A folder
that is there is read. Writes `results/fraction.json` beside this file, anew after each scoring.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from keepset.evaluate.statistics import correlations
from keepset.pipeline.score import score
from keepset.recipe import Recipe, load_recipe
from keepset.selection.ranking import rank_order
from keepset.stages.job import Job
from keepset.stages.trained import Reference

HERE = Path(__file__).parent
TOP = 0.15


def main() -> None:
    recipe = load_recipe(sys.argv[1] if len(sys.argv) > 1 else HERE / "recipe.yaml")
    folder = Path(recipe.run_dir).parent
    whole = scored(recipe, folder / "whole-0", 1.0, 0)
    results: list[dict[str, Any]] = []
    (HERE / "results").mkdir(exist_ok=True)
    others = [(0.1, 0), (0.1, 1), (0.1, 2), (0.25, 0), (1.0, 1), (0.5, 0), (0.25, 1), (0.5, 1), (0.25, 2), (0.5, 2)]
    for fraction, seed in others:  # another seed of the whole says what the seed alone changes
        name = f"{fraction:g}-{seed}" if fraction < 1 else f"whole-{seed}"
        results.append(against(whole, scored(recipe, folder / name, fraction, seed), fraction, seed))
        print(results[-1], flush=True)
        text = json.dumps({"rows": len(whole["id"]), "top": TOP, "scorings": results}, indent=1)
        (HERE / "results/fraction.json").write_text(text + "\n", encoding="utf-8")


def scored(recipe: Recipe, run_dir: Path, fraction: float, seed: int) -> dict[str, Any]:
    """DavIR's table of one reference, and the seconds of its training."""
    base = Path(recipe.run_dir) / "work/losses-base"
    if base.is_dir() and not run_dir.exists():
        shutil.copytree(base, run_dir / "work/losses-base")
    reference = recipe.reference.model_copy(update={"fraction": fraction})
    job = Job(recipe.model_copy(update={"run_dir": str(run_dir), "seed": seed, "reference": reference}))
    with job.run.lock():
        table = score(job, recipe.methods[0])
    drawn = {str(i) for i in Reference()._rows(job)[1]}
    seconds = sum(e["seconds"] for e in job.run.costs() if e["stage"].startswith("train "))
    return {**table.to_pydict(), "drawn": drawn, "seconds": seconds}


def against(whole: dict[str, Any], other: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """Agreement of a scoring with that of the whole pool's reference; `seen`: rows its own was trained on."""
    assert whole["id"] == other["id"]
    ids = np.array(whole["id"])
    a, b = np.array(whole["score"]), np.array(other["score"])
    seen = np.isin(ids, sorted(other["drawn"]))
    k = int(TOP * len(ids))
    best = [set(rank_order(x, ids)[:k].tolist()) for x in (a, b)]
    unseen = {} if seen.all() else {
        "spearman_unseen": round(correlations(a[~seen], b[~seen]).spearman, 4),
        "seen_in_top": round(float(seen[sorted(best[1])].mean()), 4),
        "mean_seen": round(float(b[seen].mean()), 4), "mean_unseen": round(float(b[~seen].mean()), 4),
    }  # fmt: skip
    return {
        "fraction": fraction, "seed": seed, "trained_on": int(seen.sum()),
        "spearman": round(correlations(a, b).spearman, 4), "overlap": round(len(best[0] & best[1]) / k, 4),
        **unseen, "train_seconds": round(other["seconds"], 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
