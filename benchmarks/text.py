"""Text methods: DSIR against the `data-selection` package, BM25 against a naive loop, a million rows through four.

Run `python benchmarks/text.py` (about 15 minutes on two cores). The package lives in a venv of its own, which is made
in ~/.cache/keepset unless `--dsir-python` names an interpreter that has it. Every contender runs in a fresh process,
reads its pool from the same JSONL file and is timed inside it, reading included. CPU seconds stand beside wall seconds:
they say the same on a busy machine.

    dsir      real text (Alpaca, CoT, FLAN, Dolly, GSM8K, CodeAlpaca), target 500 GSM8K test rows; two pools: each row
              once (no repeats to profit from), and shuffled repeats up to 200,000 rows. The package uses all cores,
              ours one.
    bm25      5,000 rows, 40 queries, against the formula in plain Python; same scores to 1e-5
    million   a synthetic pool (Zipf's law over 200,000 words, 60 words a row on average); peak = RSS of the process,
              the texts themselves included ("texts only" is that share)
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from scipy.stats import spearmanr

from keepset.data.words import count_words, terms
from keepset.methods.bm25 import bm25
from keepset.methods.dsir import dsir
from keepset.methods.length import length
from keepset.methods.random_ import random_
from keepset.selection.select import select

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
POOL_FILES = [
    "alpaca/alpaca_union",
    "cot/flan_cot",
    "flan/p3_t0_train",
    "dolly/dolly_3k",
    "gsm8k/train",
    "codealpaca/new_codealpaca",
]
NOT_TEXT = {"in", "task", "template", "category"}


def read_texts(path: Path) -> list[str]:
    """Each row's text fields on lines of their own."""
    if not path.exists():
        sys.exit(f"{path}: no data; --data names a folder with {path.parent.name}/{path.name}")
    with path.open("rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        rows = [json.loads(line) for line in lines if line.strip()]
    return ["\n".join(str(v) for k, v in row.items() if k not in NOT_TEXT and v) for row in rows]


def write_jsonl(path: Path, texts: Iterator[str] | list[str]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def read_jsonl(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


# the workers: one process each


def worker(method: str, pool: str, target: str, out: str) -> None:
    """Score a pool file; print seconds (with and without reading) and the peak RSS in GiB; save the scores."""
    start = time.perf_counter()
    docs, queries = read_jsonl(pool), read_jsonl(target)
    read = time.perf_counter()
    ids = [f"{i:032x}" for i in range(len(docs))]
    scores = METHODS[method](docs, queries, ids)
    scored = time.perf_counter()
    if method != "texts only":
        assert len(select(scores, ids, ("rows", len(docs) // 20))) == len(docs) // 20
    selected = time.perf_counter()
    if out:
        np.save(out, scores)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = {"read": read - start, "score": scored - read, "select": selected - scored, "seconds": scored - start}
    print(json.dumps({**times, "peak_gib": peak}))


def score_length(docs: list[str], queries: list[str], ids: list[str]) -> np.ndarray:
    return length(count_words(docs))


METHODS: dict[str, Callable[[list[str], list[str], list[str]], np.ndarray]] = {
    "texts only": lambda docs, queries, ids: np.zeros(len(docs)),
    "random": lambda docs, queries, ids: random_(ids, 0),
    "length": score_length,
    "bm25": lambda docs, queries, ids: bm25(docs, queries, [str(i % 4) for i in range(len(queries))])[0],
    "dsir": lambda docs, queries, ids: dsir(docs, queries, ids=ids)[0],
    "dsir exact": lambda docs, queries, ids: dsir(docs, queries)[0],
    "dsir fast": lambda docs, queries, ids: dsir(docs, queries, hash="fast")[0],
}


def run(*command: str) -> dict[str, Any]:
    """Run a worker; return what its last line says, and the CPU seconds of it and its children, start-up included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "cpu": cpu}


def ours(method: str, pool: Path, target: Path, out: str = "") -> dict[str, Any]:
    return run(sys.executable, str(Path(__file__).resolve()), "--worker", method, str(pool), str(target), out)


# the comparisons


def package_python(given: str | None) -> str:
    """Return an interpreter that has the package, making a venv for it if none was named."""
    if given:
        return given
    folder = Path.home() / ".cache" / "keepset" / "dsir-venv"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"installing data-selection into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "data-selection==1.0.3", "setuptools"], check=True)
        (folder / ".ready").touch()
    return str(python)


def compare_dsir(python: str, pool: Path, target: Path, folder: Path) -> dict[str, Any]:
    """One run: ours, the package, ours again (its slower time counts), and the fast buckets."""
    processes = os.cpu_count() or 1
    first = ours("dsir exact", pool, target, str(folder / "ours.npy"))
    script = str(HERE / "text_dsir_package.py")
    package = run(python, script, str(pool), str(target), str(folder / "package.npy"), str(processes))
    second = ours("dsir exact", pool, target)
    fast = ours("dsir fast", pool, target, str(folder / "fast.npy"))
    scores = {name: np.load(folder / f"{name}.npy") for name in ("ours", "package", "fast")}
    seconds, cpu = (max(first[k], second[k]) for k in ("seconds", "cpu"))
    return {
        "rows": len(scores["ours"]),
        "package_seconds": round(package["seconds"], 1),
        "package_processes": processes,
        "ours_seconds": [round(first["seconds"], 2), round(second["seconds"], 2)],
        "ours_processes": 1,
        "speedup": round(package["seconds"] / seconds, 1),
        "package_cpu_seconds": round(package["cpu"], 1),
        "ours_cpu_seconds": [round(first["cpu"], 2), round(second["cpu"], 2)],
        "cpu_speedup": round(package["cpu"] / cpu, 1),
        "rank_correlation": round(float(spearmanr(scores["ours"], scores["package"])[0]), 6),
        "fast_hash_seconds": round(fast["seconds"], 2),
        "fast_hash_speedup": round(package["seconds"] / fast["seconds"], 1),
        "fast_hash_rank_correlation": round(float(spearmanr(scores["fast"], scores["package"])[0]), 4),
    }


def naive_bm25(docs: list[str], queries: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's BM25 as one writes it first."""
    counts = [Counter(terms(doc)) for doc in docs]
    lengths = [sum(count.values()) for count in counts]
    average = sum(lengths) / len(lengths)
    df = Counter(word for count in counts for word in count)
    out = np.zeros((len(docs), len(queries)))
    for m, query in enumerate(map(terms, queries)):
        for n, (tf, size) in enumerate(zip(counts, lengths, strict=True)):
            for word in query:
                if word in tf:
                    idf = log(1 + (len(docs) - df[word] + 0.5) / (df[word] + 0.5))
                    out[n, m] += idf * tf[word] / (tf[word] + k1 * (1 - b + b * size / average))
    return out


def compare_bm25(docs: list[str], queries: list[str]) -> dict[str, Any]:
    bm25(docs[:10], queries[:1], ["x"])  # imports
    ratios = []
    for _ in range(3):  # interleaved; the lowest ratio is kept
        start = time.perf_counter()
        expected = naive_bm25(docs, queries)
        naive = time.perf_counter() - start
        _, got = bm25(docs, queries, ["x"] * len(queries), per="query")
        own = time.perf_counter() - start - naive
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        ratios.append((naive / own, naive, own))
    ratio, naive, own = min(ratios)
    sizes = {"rows": len(docs), "queries": len(queries)}
    return {**sizes, "naive_seconds": round(naive, 2), "ours_seconds": round(own, 2), "speedup": round(ratio, 1)}


def synthetic(n: int, seed: int, vocabulary: int = 200_000) -> Iterator[str]:
    """Yield texts with Zipf-distributed words and log-normal lengths (60 words on average)."""
    rng = np.random.default_rng(seed)
    names = np.array([f"w{i:x}" for i in range(vocabulary)], dtype=object)
    bounds = np.cumsum(1 / np.arange(1, vocabulary + 1))
    for _ in range(0, n, 1000):
        sizes = np.maximum(1, rng.lognormal(3.77, 0.8, 1000).astype(int))
        chosen = names[np.searchsorted(bounds, rng.random(sizes.sum()) * bounds[-1])]
        yield from (" ".join(part) + "." for part in np.split(chosen, np.cumsum(sizes)[:-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KEEPSET_BENCH_DATA", DATA)))
    parser.add_argument("--dsir-python", help="an interpreter with `data-selection` installed")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the synthetic pool")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "text.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)

    python = package_python(args.dsir_python)
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = list(dict.fromkeys(text for f in POOL_FILES for text in read_texts(args.data / f"{f}.jsonl.zst")))
        goal = read_texts(args.data / "gsm8k/test_first819.jsonl.zst")[:500]
        target = write_jsonl(folder / "target.jsonl", goal)
        once = [once[i] for i in rng.permutation(len(once))]
        many = [once[i] for _ in range(-(-200_000 // len(once))) for i in rng.permutation(len(once))][:200_000]
        result["dsir"] = compare_dsir(python, write_jsonl(folder / "many.jsonl", many), target, folder)
        print("dsir, 200k rows:", result["dsir"], flush=True)
        result["dsir_each_row_once"] = compare_dsir(python, write_jsonl(folder / "once.jsonl", once), target, folder)
        print("dsir, each row once:", result["dsir_each_row_once"], flush=True)
        result["bm25"] = compare_bm25(once[:5000], goal[:40])
        print("bm25:", result["bm25"], flush=True)

        pool = write_jsonl(folder / "million.jsonl", synthetic(args.rows, 0))
        shots = write_jsonl(folder / "shots.jsonl", list(synthetic(1000, 1))[:40])
        million = {}
        for method in ("texts only", "random", "length", "bm25", "dsir"):
            million[method] = {k: round(v, 2) for k, v in ours(method, pool, shots).items()}
            print(f"{args.rows} rows, {method}: {million[method]}", flush=True)
    result["million_rows"] = {"rows": args.rows, **million}
    methods = [m for m in million if m != "texts only"]
    summary = {
        "dsir_speedup": result["dsir"]["speedup"],
        "dsir_cpu_speedup": result["dsir"]["cpu_speedup"],
        "dsir_speedup_each_row_once": result["dsir_each_row_once"]["speedup"],
        "dsir_cpu_speedup_each_row_once": result["dsir_each_row_once"]["cpu_speedup"],
        "dsir_rank_correlation": result["dsir"]["rank_correlation"],
        "bm25_speedup_over_naive": result["bm25"]["speedup"],
        "million_rows_seconds": {m: million[m]["score"] for m in methods},
        "million_rows_peak_gib": {m: million[m]["peak_gib"] for m in methods},
        "million_rows_texts_only_gib": million["texts only"]["peak_gib"],
        "command": "python benchmarks/text.py",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__},
        "details": result,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
