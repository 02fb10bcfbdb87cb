"""How the cost of choosing grows with the pool: processor seconds, memory, disk and counted operations, 1K to 50K rows.

Run `python benchmarks/growth.py` (about 12 minutes of one quiet thread). What the results file holds already is not
measured again: `--out` names another, `--sizes` and `--methods` less. Two pools of n rows:

    text        60 words a row by Zipf's law (that of `text.py`), target 40 rows: the text methods, and the policies
    model       some 20 tokens a row for a 2-layer random Llama (hidden size 32): model methods, each from the start,
                its reference or warm-up (5 %, two checkpoints) included; 6 pairs in 2 tasks

Facility location stops at 20,000 rows: from 16,384 on it makes similarities anew, and 50,000 take many minutes.
Every measurement is a process of its own, forked once the pool is in memory and tokenised, so that seconds and the peak
above that are the method's; it is refused any connection. `exponent` = log(cost at the largest n / cost at a tenth of
it) / log 10; `a row` = the difference of the two over the difference of the rows, so that what is paid once (starting a
trainer, its buffers) doesn't count. The tiny model makes Python's share large: seconds are for the growth, operations
for the size. docs/theory.md, section 7, holds the formulas.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import io
import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from rich.console import Console  # noqa: E402
from text import synthetic  # noqa: E402

from conftest import tiny_model, tiny_tokenizer  # noqa: E402
from keepset.data.words import chunks, hash_tokens, ngram_vectors  # noqa: E402
from keepset.methods.bm25 import bm25  # noqa: E402
from keepset.methods.dsir import dsir  # noqa: E402
from keepset.methods.length import length  # noqa: E402
from keepset.methods.random_ import random_  # noqa: E402
from keepset.pipeline.price import selection_work  # noqa: E402
from keepset.pipeline.score import score  # noqa: E402
from keepset.recipe import MethodSpec, SelectSpec, parse_recipe  # noqa: E402
from keepset.selection.select import select  # noqa: E402
from keepset.stages.job import Job  # noqa: E402

MODEL_METHODS = [
    "perplexity", "ifd", "el2n", "rds", "knn-shapley", "davir", "forgetting", "tracin", "less", "rose", "influence",
    "datainf", "ekfac", "in-run-shapley",
]  # fmt: skip
POLICIES = ["top_k", "round_robin", "mmr", "facility_location", "dedup near"]
FACILITY = [1000, 2000, 10_000, 20_000]
TEXT = ["random", "length", "bm25", "dsir", *POLICIES]
WORDS = ["the", "answer", "is", "user", "thing", "wants", "helpful", "assistant", "that"]


def refuse(*_: Any) -> None:
    raise ConnectionError("choosing must not need a network")


def resident(what: str) -> float:
    """This process's memory now (VmRSS) or at its peak (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def measured(work: Callable[[], Any], folder: Path | None = None) -> dict[str, float]:
    """Run `work` in a fork: processor seconds, peak MiB above what the fork started with, MiB left under `folder`."""

    def child(pipe: Any) -> None:
        socket.socket.connect = refuse  # type: ignore[method-assign]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what the pool's reading freed would be used without being counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = resident("VmRSS"), time.process_time()
        work()
        seconds = time.process_time() - start
        peak = resident("VmHWM") - before
        pipe.send({"cpu_seconds": seconds, "peak_mib": max(0.0, peak)})
        pipe.close()

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        sys.exit("a measurement ended without a result; its error stands above")
    process.join()
    if folder is not None:
        files = [p for p in folder.rglob("*") if p.is_file()]
        found["disk_mib"] = sum(p.stat().st_size for p in files) / 2**20
    return {k: round(v, 4) for k, v in found.items()}


Note = Callable[[str, int, dict[str, float]], None]


def text_costs(n: int, methods: list[str], note: Note) -> None:
    """Text methods and policies on n synthetic rows."""
    docs = [text for _, text in zip(range(n), synthetic(max(n, 1000), 0), strict=False)]
    goals = [text for _, text in zip(range(40), synthetic(1000, 1), strict=False)]
    ids = [f"{i:032x}" for i in np.random.default_rng(0).permutation(n)]
    tasks = [str(i % 4) for i in range(len(goals))]
    scores, per_task = random_(ids, 1), np.stack([random_(ids, 2 + j) for j in range(4)], axis=1)
    vectors = ngram_vectors(docs)

    def policy(name: str) -> Callable[[], Any]:
        near = name == "dedup near"
        options = {"dedup": "near"} if near else {"policy": name}
        spec, few = SelectSpec.model_validate({"diversity": 0.5, **options}), ("rows", max(1, n // 20))
        texts = docs if near else None
        return lambda: select(scores, ids, few, spec=spec, per_task=per_task, texts=texts, embeddings=vectors)

    works: dict[str, Callable[[], Any]] = {
        "random": lambda: random_(ids, 0),
        "length": lambda: length(np.concatenate([np.diff(hash_tokens(part).offsets) for part in chunks(docs)])),
        "bm25": lambda: bm25(docs, goals, tasks),
        "dsir": lambda: dsir(docs, goals, ids=ids),
        **{name: policy(name) for name in POLICIES},
    }
    bm25(docs[:10], goals[:1], ["x"])  # imports
    for name in methods:
        note(name, n, measured(works[name]))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def model_costs(n: int, folder: Path, methods: list[str], note: Note) -> None:
    """Model methods on n rows of a tiny random model, each alone and from the start."""
    rng = np.random.default_rng(0)

    def text(k: int) -> str:
        return " ".join(rng.choice(WORDS, k))

    # the system turn that all rows share is left out: the engine runs it once a batch, and rows would be all start
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder / "model")
    tiny_tokenizer(template).save_pretrained(folder / "model")
    pool = [{"instruction": f"q{i:05x}", "input": "", "output": text(2 + i % 7)} for i in range(n)]
    pairs = [
        {"task": "ab"[i % 2], "prompt": f"p{i}", "chosen": text(5), "rejected": text(4)} for i in range(6)
    ]  # fmt: skip
    train = {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 64}
    recipe = parse_recipe(
        {
            "run_dir": str(folder / "run"),
            "model": {"model_name_or_path": str(folder / "model"), "max_length": 200},
            "lora": {"lora_r": 2, "lora_alpha": 4},
            "pool": write_lines(folder / "pool.jsonl", pool),
            "target": write_lines(folder / "target.jsonl", pairs),
            "methods": MODEL_METHODS,
            "budget": "5%",
            "warmup": {**train, "num_train_epochs": 2},
            "reference": train,
            "train": train,
            "batching": {"token_budget": 4096},
        }
    )
    quiet = Console(file=io.StringIO())
    job = Job(recipe, console=quiet)
    assert len(job.rows) == n and len(job.target_pairs[0]) == 6
    job.loaded, job.ids  # noqa: B018 - made before the forks
    import peft  # noqa: F401
    import trl  # noqa: F401

    made = [job.run.path / name for name in ("work", "scores", "models")]
    for name in methods:
        spec = MethodSpec(name=name)
        one = measured(lambda spec=spec: score(job, spec), job.run.path)
        one["flops"] = sum(w.flops for w in selection_work(job, [spec]))
        one["tokens"] = float(sum(len(r.input_ids) for r in job.rows))
        note(name, n, one)
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def growth(costs: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Exponent over the last factor of ten (or what there is), and cost a further row."""
    sizes = sorted(costs)
    top = sizes[-1]
    low = min((s for s in sizes if s < top), key=lambda s: abs(s - top / 10))
    out: dict[str, Any] = {"from": low, "to": top}
    for what in costs[top]:
        a, b = costs[low][what], costs[top][what]
        exponent = round(float(np.log(b / a) / np.log(top / low)), 2) if a > 0 and b > 0 else None
        out[what] = {"exponent": exponent, "a_row": (b - a) / (top - low), "at_largest": b}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 5000, 50_000])
    parser.add_argument("--methods", nargs="+", default=[], help="some of the methods and policies; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "growth.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in (*TEXT, *MODEL_METHODS)}
    if args.out.exists():
        for name, costs in json.loads(args.out.read_text())["details"].items():
            found[name] = {int(n): cost for n, cost in costs.items()}

    def note(name: str, n: int, one: dict[str, float]) -> None:
        found[name][n] = one
        print(f"{n} rows, {name}: {one}", flush=True)
        write(args.out, found)

    def missing(names: list[str], n: int) -> list[str]:
        some = [m for m in names if n in (FACILITY if m == "facility_location" else args.sizes)]
        return [m for m in some if n not in found[m] and (not args.methods or m in args.methods)]

    for n in sorted({*args.sizes, *FACILITY}):
        if missing(TEXT, n):
            text_costs(n, missing(TEXT, n), note)
        if missing(MODEL_METHODS, n):
            with tempfile.TemporaryDirectory() as folder:
                model_costs(n, Path(folder), missing(MODEL_METHODS, n), note)
    print_table(write(args.out, found))


def write(path: Path, found: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Write what was measured so far; returns the growth of what has two sizes."""
    table = {name: growth(costs) for name, costs in found.items() if len(costs) > 1}
    summary = {
        "growth": table,
        "command": "python benchmarks/growth.py",
        "date": datetime.date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "threads": 1, "python": platform.python_version()},
        "details": {name: {n: costs[n] for n in sorted(costs)} for name, costs in found.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return table


def print_table(table: dict[str, Any]) -> None:
    """The rows of docs/theory.md, 7.4."""
    columns = [
        ("cpu_seconds", 1e3, "processor: exponent, ms a row"),
        ("flops", 1e-6, "counted: exponent, MFLOP a row"),
        ("peak_mib", 1.0, "peak at the largest pool, MiB"),
        ("disk_mib", 2**20, "disk, bytes a row"),
    ]
    print("| | rows | " + " | ".join(title for _, _, title in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name, one in table.items():
        cells = []
        for what, unit, _ in columns:
            part = one.get(what, {})
            if not part:
                cells.append("–")
            elif what == "peak_mib":
                cells.append(f"{part['at_largest']:.0f}")
            elif what == "disk_mib":
                cells.append(f"{part['a_row'] * unit:.0f}")
            else:
                cells.append(f"{part['exponent']:.2f}, {part['a_row'] * unit:.2g}")
        print(f"| `{name}` | {one['from']:,} to {one['to']:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
