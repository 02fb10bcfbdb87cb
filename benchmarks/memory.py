"""Peak memory of scoring a large pool by the methods that need no model: 100,000, 500,000 and 1,000,000 rows.

Run `python benchmarks/memory.py` (about 10 minutes on one core). Each size and method is one `keepset score` in its own
process: reading the JSONL file, checking every row, scoring, writing the scores. Rows are synthetic, 60 words each
on average.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent / "results" / "memory.json"
WORDS = 200_000


def write_pool(path: Path, n: int) -> None:
    """A file of n Alpaca rows, a prompt of 20 and an answer of 40 words on average, by Zipf's law."""
    rng = np.random.default_rng(n)
    with path.open("w", encoding="utf-8") as out:
        for start in range(0, n, 10_000):
            lengths = rng.integers(10, 111, min(10_000, n - start))
            words = rng.zipf(1.3, lengths.sum()) % WORDS
            for k, part in enumerate(np.split(words, np.cumsum(lengths)[:-1])):
                text = [f"w{w}" for w in part]
                third = len(text) // 3
                row = {"instruction": f"{start + k} " + " ".join(text[:third]), "input": "",
                       "output": " ".join(text[third:])}  # fmt: skip
                out.write(json.dumps(row) + "\n")


def peak_of(*command: str) -> tuple[float, float]:
    """Run a command; its seconds and the peak of its resident memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: {told[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, print a table, write `results/memory.json`."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[100_000, 500_000, 1_000_000])
    options.add_argument("--methods", nargs="+", default=["random", "dsir"])
    options.add_argument("--out", type=Path, default=OUT)
    chosen = options.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target.jsonl"
        write_pool(target, 50)
        for n in chosen.rows:
            pool = Path(folder) / "pool.jsonl"
            write_pool(pool, n)
            for method in chosen.methods:
                run = Path(folder) / f"run-{n}-{method}"
                seconds, peak = peak_of(
                    sys.executable, "-m", "keepset", "score", method, "--pool", str(pool), "--target", str(target),
                    "--run_dir", str(run),
                )  # fmt: skip
                entry = {"rows": n, "method": method, "seconds": round(seconds, 1), "peak_mib": round(peak),
                         "pool_mib": round(pool.stat().st_size / 2**20)}  # fmt: skip
                found.append(entry)
                print(entry, flush=True)
    result = {"command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
              "date": time.strftime("%Y-%m-%d"), "runs": found}  # fmt: skip
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
