"""ROSE scores for less than four checkpoints of every layer: what each saving costs in rank agreement, on real data.

Run `python experiments/rose-shp/build.py --data DATA`, then `python benchmarks/cheaper.py --threads 1` (20 minutes).
Pool: rows of its four sources (Alpaca, GSM8K, CoT, SHP answers) in equal parts; target: the ROSE paper's SHP 2-shot
pairs; SmolLM2-135M-Instruct, LoRA r = 8, a warm-up of four epochs on a quarter of the pool. The exact score is ROSE
with four checkpoints, torch's Adam map. Cost is processor time of the pool's pass over that of the exact pass.

    last n checkpoints   the exact numbers of those alone
    top k layers         LoRA gradients of the top k layers: the backward pass stops below them
    cap s                a row is cut after its s-th supervised token
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from scipy.stats import spearmanr

from keepset.adapters import attached
from keepset.data import load_pool, load_target
from keepset.encoding import Encoded, encode_all
from keepset.features.adam import load_adam
from keepset.features.influence import influence
from keepset.features.targets import target_vectors
from keepset.methods.rose import rose
from keepset.model import load
from keepset.recipe import LoraSpec, ModelSpec, WarmupSpec
from keepset.train.warmup import warmup

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "runs" / "data" / "rose-shp"


def capped(row: Encoded, tokens: int) -> Encoded:
    """Cut a row after its first so many supervised tokens."""
    where = np.flatnonzero(row.supervised)
    if len(where) <= tokens:
        return row
    end = int(where[tokens - 1]) + 1
    return replace(row, input_ids=row.input_ids[:end], supervised=row.supervised[:end])


def first_of_each(tasks: np.ndarray, shots: int) -> list[int]:
    """Positions of the first pairs of every task."""
    return [int(i) for task in np.unique(tasks) for i in np.flatnonzero(tasks == task)[:shots]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--layers", type=int, nargs="*", default=[8])
    parser.add_argument("--caps", type=int, nargs="*", default=[32])
    parser.add_argument("--shots", type=int, default=2, help="pairs a task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cheaper.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = ModelSpec(model_name_or_path="demo", max_length=256, overlong="truncate")
    loaded = load(spec)
    messages = []
    for name in ("alpaca", "gsm8k", "cot", "shp"):
        pool = load_pool(str(args.data / f"{name}.jsonl"))
        messages += [pool.messages(i) for i in range(args.rows // 4)]
    rows = [r for r in encode_all(loaded.encoder, messages)[0] if r is not None]
    target = load_target(str(args.data / "target.jsonl"))
    target = target.take(np.array(first_of_each(target.tasks, args.shots)))
    names, tasks = np.unique(target.tasks, return_inverse=True)
    pairs = []
    for i in range(len(target)):
        prompt, chosen, rejected = target.pair(i)
        assert rejected is not None
        pairs.append(tuple(loaded.encoder.encode_pair(prompt, side) for side in (chosen, rejected)))
    lora = LoraSpec(lora_r=8, lora_alpha=32)
    first = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 4]
    variants: dict[str, dict[str, Any]] = {"all layers": {}}
    variants |= {f"top {k} layers": {"last_layers": k} for k in args.layers}
    variants |= {f"cap {s}": {"cap": s} for s in args.caps}
    found: dict[str, list[Any]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        how = WarmupSpec(learning_rate=2e-4, per_device_train_batch_size=6)
        checkpoints = warmup(spec, lora, [rows[i] for i in first], Path(folder), how, seed=0)
        for checkpoint in checkpoints:
            adam = load_adam(checkpoint.path)
            with attached(loaded.model, checkpoint.path) as model:
                vectors: dict[int | None, Any] = {}
                for name, options in variants.items():
                    layers = {k: v for k, v in options.items() if k == "last_layers"}
                    some = [capped(r, options["cap"]) for r in rows] if "cap" in options else rows
                    depth = options.get("last_layers")
                    if depth not in vectors:
                        vectors[depth] = target_vectors(model, pairs, tasks, n_tasks=len(names), **layers)  # type: ignore[arg-type]
                    clock = time.process_time()
                    found[name].append(influence(model, some, vectors[depth], adam=adam, map="adam", **layers))
                    spent[name] += time.process_time() - clock
                    print(f"step {checkpoint.step}: {name}: {spent[name]:.0f} s so far", flush=True)
    lr = np.array([c.mean_lr for c in checkpoints])

    def score(name: str, last: int) -> np.ndarray:
        parts = found[name][-last:]
        return rose(np.stack([f.dots for f in parts]), np.stack([f.norms for f in parts]), lr[-last:])[0]

    exact, table = score("all layers", len(lr)), []
    top = max(1, len(rows) // 20)
    for name in variants:
        for last in (len(lr), 2, 1):
            got = score(name, last)
            same = len(set(np.argsort(-got)[:top]) & set(np.argsort(-exact)[:top])) / top
            rank = float(spearmanr(got, exact).statistic)
            cost = spent[name] / spent["all layers"] * last / len(lr)
            table.append({"variant": name, "checkpoints": last, "cost": cost, "spearman": rank, "top5_overlap": same})
            print(f"| {name} | {last} | {cost:.2f} | {rank:.3f} | {same:.2f} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    context = {
        "date": datetime.date.today().isoformat(),
        "rows": len(rows),
        "pairs": len(pairs),
        "threads": args.threads,
    }
    args.out.write_text(json.dumps({"context": context, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
