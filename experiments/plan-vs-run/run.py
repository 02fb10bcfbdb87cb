"""Hold `keepset plan` against `keepset run` on three small recipes: both as a user starts them, one after the other.

Taken is the wall time of the whole command, imports included; predicted is the plan's sum. Run both under the same
conditions: another load between them spoils the comparison, so each recipe's plan is made right before its run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = ("text", "davir", "rose")


def keepset(*words: str) -> tuple[float, str]:
    """Run a command; its seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "keepset", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start, done.stdout


def stages(run_dir: Path) -> dict[str, float]:
    """Seconds of each stage that the run wrote down."""
    lines = (run_dir / "costs.jsonl").read_text().splitlines()
    return {entry["stage"]: entry["seconds"] for entry in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    args = parser.parse_args()
    out = HERE / "results" / "plan.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in args.recipes:
        recipe, run_dir = HERE / f"{name}.yaml", Path("runs/plan-vs-run") / name
        shutil.rmtree(run_dir, ignore_errors=True)
        planning, printed = keepset("plan", str(recipe), "--json", "-q")
        plan = json.loads(printed)
        taken, _ = keepset("run", str(recipe), "-q")
        ratio = plan["total_seconds"] / taken
        results[name] = {
            "predicted_seconds": plan["total_seconds"], "taken_seconds": round(taken, 1), "ratio": round(ratio, 3),
            "planning_seconds": round(planning, 1), "predicted_peak_gib": plan["peak_gib"],
            "steps": {f"{s['stage']} ({s['methods']})": round(s["seconds"], 1) for s in plan["steps"]},
            "stages": stages(run_dir), "threads": os.environ.get("OMP_NUM_THREADS"),
        }  # fmt: skip
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: predicted {plan['total_seconds']:.0f} s, taken {taken:.0f} s, ratio {ratio:.2f}; "
              f"planning took {planning:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
