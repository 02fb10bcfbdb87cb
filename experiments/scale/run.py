"""Measure what choosing costs at 10K, 50K and 200K rows: real `keepset score` processes on a JSONL file, one at a time.

    python experiments/scale/build.py --data DATA      # DATA: the folder of public .jsonl.zst files
    python experiments/scale/run.py

Each method starts from nothing in a run folder of its own: the file is read, every row checked and encoded, the
reference or warm-up trained. Processor time and peak memory are the system's count for the whole process, the seconds
of its stages are those of `costs.jsonl`. `10` rows give what a process takes before it looks at a pool. `select` keeps
5 % of DavIR's scores. What `results/scale.json` holds is not measured again. One thread.
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

HERE = Path(__file__).parent
OUT = HERE / "results" / "scale.json"
DATA = Path("runs/data/scale")
START = 10  # rows: what a process takes whatever the pool
SIZES = (START, 10_000, 50_000, 200_000)
TEXT = ("random", "bm25", "dsir")
METHODS = (*TEXT, "encoding", "rds", "davir", "less", "rose")
TRAIN = {"num_train_epochs": 1, "per_device_train_batch_size": 64, "learning_rate": 1e-3}
SETTINGS = {
    "model": {"max_length": 256},
    "lora": {"lora_r": 2, "lora_alpha": 4},
    "reference": TRAIN,
    "warmup": {**TRAIN, "num_train_epochs": 2, "fraction": 0.05},
    "batching": {"token_budget": 4096},
}


def settings(sections: dict[str, dict[str, Any]]) -> list[str]:
    """Options of the command line."""
    pairs = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    return [word for pair in pairs for word in ("--set", pair)]


def keepset(*words: str) -> dict[str, float]:
    """Run a command: its seconds, those of the processor, and the peak of its resident memory in MiB."""
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "keepset", *words, "-q"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"keepset {' '.join(words)}: {told[-2000:]}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def stages(run: Path) -> list[dict[str, Any]]:
    """The entries of a run folder's `costs.jsonl`."""
    lines = (run / "costs.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("stage", "rows", "tokens", "flops", "seconds", "cpu_seconds")
    return [{k: entry[k] for k in names if k in entry} for entry in map(json.loads, lines)]


def disk(folder: Path) -> float:
    """MiB of a folder's files."""
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20, 2)


def score(method: str, pool: Path, run: Path, model: str | None, options: list[str]) -> dict[str, Any]:
    """Score a pool by a method from nothing."""
    named = ["--model_name_or_path", model] if model else []
    name = "length" if method == "encoding" else method
    words = ["score", name, "--pool", str(pool), "--target", str(DATA / "target.jsonl"), "--run_dir", str(run)]
    taken = keepset(*words, *named, *options)
    return {**taken, "run_mib": disk(run), "stages": stages(run)}


def measure(method: str, n: int, folder: Path) -> dict[str, dict[str, Any]]:
    """One method at one size, and selecting after DavIR."""
    pool, run = DATA / f"pool-{n}.jsonl", folder / f"{method}-{n}"
    if n == START:
        pool = folder / "start.jsonl"
        with (DATA / "pool-10000.jsonl").open(encoding="utf-8") as rows:
            pool.write_text("".join(islice(rows, n)), encoding="utf-8")
    model = None if method in TEXT else str(DATA / "model")
    measured = {method: score(method, pool, run, model, settings(SETTINGS) if model else [])}
    if method == "davir":
        measured["select"] = {**keepset("select", "davir", "--budget", "5%", "--run_dir", str(run)), "stages": []}
    shutil.rmtree(run)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results: dict[str, Any] = {"pool": json.loads((DATA / "counts.json").read_text()), "settings": SETTINGS, "runs": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text())

    def write() -> None:
        results["date"] = time.strftime("%Y-%m-%d")
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir="runs") as made:
        folder = Path(made)
        for n in args.sizes:
            for method in args.methods:
                runs = results["runs"].setdefault(method, {})
                if str(n) in runs:
                    continue
                for name, one in measure(method, n, folder).items():
                    results["runs"].setdefault(name, {})[str(n)] = one
                    print(
                        f"{n} rows, {name}: {one['cpu_seconds']} s of the processor, {one['peak_mib']} MiB", flush=True
                    )
                write()


if __name__ == "__main__":
    main()
