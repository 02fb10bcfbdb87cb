"""Peak memory of scoring a large pool by the methods that need no model, and of making its tokens: 10K to 10M rows.

Run `python benchmarks/memory.py` (about 10 minutes on one quiet core; `--rows 10000000`: hours, and 20 GB of disk).
Each size and method is one `keepset score` in its own process: reading the JSONL file, checking every row, scoring,
writing the scores. `encoding` is `length` in tokens, those of a byte-level tokenizer: its `MiB` hold 390 of torch and
the tokenizer. Rows are synthetic, 60 words each on average. `--table` prints what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
OUT = Path(__file__).resolve().parent / "results" / "memory.json"
WORDS = 200_000


def write_pool(path: Path, n: int) -> None:
    """A file of n Alpaca rows, a prompt of 20 and an answer of 40 words on average, by Zipf's law.

    Beyond a million rows these come again, each time with a further word of their own in front.
    """
    first = min(n, 1_000_000)
    rng = np.random.default_rng(first)
    with path.open("w", encoding="utf-8") as out:
        for start in range(0, first, 10_000):
            lengths = rng.integers(10, 111, min(10_000, first - start))
            words = rng.zipf(1.3, lengths.sum()) % WORDS
            for k, part in enumerate(np.split(words, np.cumsum(lengths)[:-1])):
                text = [f"w{w}" for w in part]
                third = len(text) // 3
                row = {"instruction": f"{start + k} " + " ".join(text[:third]), "input": "",
                       "output": " ".join(text[third:])}  # fmt: skip
                out.write(json.dumps(row) + "\n")
    with path.open("a", encoding="utf-8") as out:
        for copy in range(1, -(-n // first)):
            with path.open(encoding="utf-8") as rows:
                for line in islice(rows, min(first, n - copy * first)):
                    out.write(line.replace('"instruction": "', f'"instruction": "copy{copy} ', 1))


def peak_of(*command: str) -> tuple[float, float, float]:
    """Run a command; its seconds, those of the processor, and the peak of its resident memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: {told[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def print_table(runs: list[dict[str, Any]]) -> None:
    """Peak memory and processor seconds, a line for each size."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    print("| rows | " + " | ".join(f"`{m}` MiB, processor s" for m in methods) + " |")
    print("|---" * (len(methods) + 1) + "|")
    for n in sorted({run["rows"] for run in runs}):
        cells = {run["method"]: f"{run['peak_mib']:,}, {run['cpu_seconds']:,.0f}" for run in runs if run["rows"] == n}
        print(f"| {n:,} | " + " | ".join(cells.get(m, "–") for m in methods) + " |")


def main() -> None:
    """Measure, print a table, write `results/memory.json`."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--methods", nargs="+", default=["random", "bm25", "dsir", "encoding"])
    options.add_argument("--table", action="store_true", help="print what was measured before")
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.model:
        save_tiny(chosen.model)
        return
    runs = json.loads(chosen.out.read_text())["runs"] if chosen.out.exists() else []
    if chosen.table:
        print_table(runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        target, model = Path(folder) / "target.jsonl", Path(folder) / "model"
        write_pool(target, 50)
        if "encoding" in chosen.methods:
            # in a process of its own: a child's peak is never below what its parent had when it was started
            subprocess.run([sys.executable, __file__, "--model", str(model)], check=True, capture_output=True)
        for n in chosen.rows:
            pool = Path(folder) / "pool.jsonl"
            write_pool(pool, n)
            for method in chosen.methods:
                run = Path(folder) / f"run-{n}-{method}"
                name, more = (method, []) if method != "encoding" else ("length", ["--model_name_or_path", str(model)])
                seconds, cpu, peak = peak_of(
                    sys.executable, "-m", "keepset", "score", name, "--pool", str(pool), "--target", str(target),
                    "--run_dir", str(run), *more,
                )  # fmt: skip
                entry = {"rows": n, "method": method, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
                         "peak_mib": round(peak), "pool_mib": round(pool.stat().st_size / 2**20),
                         "run_mib": round(disk(run) / 2**20)}  # fmt: skip
                runs = [old for old in runs if (old["rows"], old["method"]) != (n, method)] + [entry]
                print(entry, flush=True)
                result = {"command": "python benchmarks/memory.py", "date": time.strftime("%Y-%m-%d"), "runs": runs}
                chosen.out.write_text(json.dumps(result, indent=1) + "\n")
                shutil.rmtree(run)
    print_table(runs)


def disk(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_tiny(folder: Path) -> None:
    """A 2-layer model with a byte-level tokenizer."""
    from conftest import tiny_model, tiny_tokenizer

    tiny_model("llama", max_position_embeddings=8192).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
