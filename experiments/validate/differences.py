"""Which scores differ, by the same trainings: `python differences.py [RECIPE]`, after run.py.

Two scores of one bank are judged by the same halves and queries, so their difference is less uncertain than either LDS:
its interval is that of the differences of the same 2,000 draws. Written to results/NAME-differences.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from keepset.evaluate.truth import ENDS, lds_draws
from keepset.pipeline.bank import Bank
from keepset.pipeline.validate import Judge, scores_of
from keepset.recipe import load_recipe
from keepset.stages.job import Job

HERE = Path(__file__).parent
OUTCOMES = ("loss.target", "loss.target.preference", "loss.heldout", "loss.chosen", "loss.preference")
RIVALS = {
    "rose": ["less", "bm25", "rds+", "metagradient", "length"], "less": ["bm25", "rds+", "metagradient-sft", "length"],
    "influence": ["influence-unit"], "datainf": ["datainf-unit"], "ekfac": ["ekfac-unit"],
    "in-run-shapley": ["in-run-unit"], "davir": ["rho-mean", "loss"], "bm25": ["bm25-query"], "rds": ["rds+"],
}  # fmt: skip


def main() -> None:
    """Print and write each pair's differences."""
    recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "bank.yaml"
    job = Job(load_recipe(recipe))
    with job.run.lock():
        bank = Bank(job)
        judge = Judge(job, bank, scores_of(job, bank), bank.measure(None))
        halves = bank.halves()
        models = judge.measured(halves)
    kept = np.stack([member.kept for member in halves]).astype(float)
    for start in ("rose", "less"):
        RIVALS[start] += [label for label in judge.tables if label.startswith(f"{start}-")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in OUTCOMES:
        outcome = judge.outcome(name, models)
        by_query, in_all = judge.predictions(kept, name, outcome.tasks)
        judged = {name: (by_query, outcome.measured), f"{name} (mean)": (in_all, outcome.measured.whole())}
        for title, (predicted, measured) in judged.items():
            value, draws = lds_draws(predicted, measured, resamples=2000)
            for one, others in RIVALS.items():
                for other in others:
                    low, high = np.percentile(draws[other] - draws[one], ENDS)
                    facts = {"difference": value[other] - value[one], "low": float(low), "high": float(high)}
                    found.setdefault(f"{other} - {one}", {})[title] = facts
    for pair, by_outcome in found.items():
        apart = [f"{title} {f['difference']:+.2f} [{f['low']:+.2f}, {f['high']:+.2f}]"
                 for title, f in by_outcome.items() if f["low"] > 0 or f["high"] < 0]  # fmt: skip
        print(f"{pair}: " + ("; ".join(apart) or "not told apart"))
    (HERE / f"results/{recipe.stem}-differences.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
