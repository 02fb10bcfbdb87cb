"""First use, timed: a fresh environment, the core, 5 % of 1,000 rows chosen by BM25; then DavIR on own rows.

`make first-use`. The first part uses nothing of this environment but its Python; it fails above 60 s, pip included. The
second part (`--davir`) runs in this environment, which has torch and the demo model: two commands, no recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 60.0
TOPICS = ["sailing boats", "bread baking", "tax returns", "bird songs", "chess openings", "garden soil", "train travel"]


def rows(n: int) -> list[dict[str, str]]:
    """n instruction rows on seven topics."""
    verbs = ["explain", "summarise", "list the risks of", "plan a week of", "compare two kinds of"]
    return [
        {
            "instruction": f"{verbs[i % 5]} {TOPICS[i % 7]} for person {i}",
            "input": "",
            "output": f"Here is what matters about {TOPICS[i % 7]}: "
            + "first the basics, then practice. " * (1 + i % 4),
        }
        for i in range(n)
    ]


def write(path: Path, some: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def timed(words: list[str], cwd: Path) -> float:
    """Run a command and return its seconds; its output is shown if it fails."""
    print("$ " + " ".join(Path(w).name if w.startswith("/") else w for w in words), flush=True)
    start = time.perf_counter()
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return time.perf_counter() - start


def core(folder: Path) -> None:
    """A fresh environment to 50 chosen rows."""
    write(folder / "pool.jsonl", rows(1000))
    write(folder / "shots.jsonl", [{"task": "birds", "prompt": "Which bird songs are there?", "completion": "Many."}])
    start = time.perf_counter()
    venv.create(folder / "env", with_pip=True, symlinks=True)
    made = time.perf_counter() - start
    command = str(folder / "env/bin/keepset")
    spent = {
        "environment": made,
        "install": timed(
            [
                str(folder / "env/bin/pip"),
                "install",
                "-q",
                "--disable-pip-version-check",
                "-c",
                str(ROOT / "constraints.txt"),
                str(ROOT),
            ],
            folder,
        ),  # fmt: skip
        "score": timed([command, "score", "bm25", "--pool", "pool.jsonl", "--target", "shots.jsonl", "-q"], folder),
        "select": timed([command, "select", "bm25", "--budget", "5%", "--out", "chosen.jsonl", "-q"], folder),
    }
    chosen = [json.loads(line) for line in (folder / "chosen.jsonl").read_text().splitlines()]
    assert len(chosen) == 50 and all("bird songs" in row["instruction"] for row in chosen)
    total = sum(spent.values())
    print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items()) + f"; in all {total:.1f} s")
    if total > LIMIT:
        sys.exit(f"above {LIMIT:.0f} s")


def davir(folder: Path) -> None:
    """DavIR on one's own JSON Lines: two commands, no recipe."""
    write(folder / "mine.jsonl", rows(40))
    command = str(Path(sys.executable).parent / "keepset")
    spent = timed([command, "score", "davir", "--pool", "mine.jsonl", "--model_name_or_path", "demo", "-q"], folder)
    spent += timed([command, "select", "davir", "--budget", "10%", "--out", "chosen.jsonl", "-q"], folder)
    assert len((folder / "chosen.jsonl").read_text().splitlines()) == 4
    print(f"DavIR on 40 own rows, two commands: {spent:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--davir", action="store_true", help="only the second part, in this environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-use-") as name:
        (davir if args.davir else core)(Path(name))


if __name__ == "__main__":
    main()
