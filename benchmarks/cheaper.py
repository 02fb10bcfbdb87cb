"""ROSE scores for less than four checkpoints of every layer: what each saving costs in rank agreement, on real data.

Run `python experiments/rose-shp/build.py --data DATA`, then `python benchmarks/cheaper.py --threads 1` (20 minutes).
Pool: rows of its four sources (Alpaca, GSM8K, CoT, SHP answers) in equal parts; target: the ROSE paper's SHP 2-shot
pairs; SmolLM2-135M-Instruct, LoRA r = 8, a warm-up of four epochs on a quarter of the pool. The exact score is ROSE
with four checkpoints, torch's Adam map. Cost is processor time of the pool's pass over that of the exact pass.

    last n checkpoints   the exact numbers of those alone
    top k layers         LoRA gradients of the top k layers: the backward pass stops below them
    cap s                a row is cut after its s-th supervised token
    proxy                another, smaller model's scores in the place of the model's (`--model M --proxy P`)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from scipy.stats import spearmanr

from keepset.data import Target, load_pool, load_target
from keepset.features.adam import load_adam
from keepset.features.influence import Influence, influence
from keepset.features.targets import target_vectors
from keepset.methods.rose import rose
from keepset.model.adapters import attached
from keepset.model.encode import encode_all
from keepset.model.load import load
from keepset.recipe import LoraSpec, ModelSpec, WarmupSpec
from keepset.stages.rows import first_supervised
from keepset.train.warmup import warmup

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "runs" / "data" / "rose-shp"


def first_of_each(tasks: np.ndarray, shots: int) -> list[int]:
    """Positions of the first pairs of every task."""
    return [int(i) for task in np.unique(tasks) for i in np.flatnonzero(tasks == task)[:shots]]


@dataclass
class Measured:
    """What one model's gradients gave: a variant's parts and processor seconds, checkpoint by checkpoint."""

    lr: np.ndarray
    parts: dict[str, list[Influence]]
    seconds: dict[str, list[float]]

    def score(self, variant: str, last: int) -> np.ndarray:
        """ROSE from the last so many checkpoints, (n,)."""
        parts, lr = self.parts[variant][-last:], self.lr[-last:]
        lr = lr if lr.any() else np.ones(len(lr))  # a short warm-up's last rate is 0
        return rose(np.stack([f.dots for f in parts]), np.stack([f.norms for f in parts]), lr)[0]

    def cost(self, variant: str, last: int) -> float:
        """Processor seconds of those checkpoints' passes over the pool."""
        return sum(self.seconds[variant][-last:])


def measure(name: str, messages: list[Any], target: Target, variants: dict[str, dict[str, Any]]) -> Measured:
    """Warm one model up and take every variant's gradients at its four checkpoints."""
    spec = ModelSpec(model_name_or_path=name, max_length=256, overlong="truncate")
    loaded = load(spec)
    rows = [r for r in encode_all(loaded.encoder, messages)[0] if r is not None]
    assert len(rows) == len(messages)
    names, tasks = np.unique(target.tasks, return_inverse=True)
    pairs = []
    for i in range(len(target)):
        prompt, chosen, rejected = target.pair(i)
        assert rejected is not None
        pairs.append(tuple(loaded.encoder.encode_pair(prompt, side) for side in (chosen, rejected)))
    first = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 4]
    parts: dict[str, list[Influence]] = {variant: [] for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        how = WarmupSpec(learning_rate=2e-4, per_device_train_batch_size=6)
        lora = LoraSpec(lora_r=8, lora_alpha=32)
        checkpoints = warmup(spec, lora, [(rows[i],) for i in first], Path(folder), how, seed=0)
        for checkpoint in checkpoints:
            adam = load_adam(checkpoint.path)
            with attached(loaded.model, checkpoint.path) as model:
                vectors: dict[int | None, Any] = {}
                for variant, options in variants.items():
                    depth = options.get("last_layers")
                    some = [first_supervised(r, options["cap"]) for r in rows] if "cap" in options else rows
                    if depth not in vectors:
                        vectors[depth] = target_vectors(model, pairs, tasks, n_tasks=len(names), last_layers=depth)  # type: ignore[arg-type]
                    start = time.process_time()
                    parts[variant].append(influence(model, some, vectors[depth], adam=adam, last_layers=depth))
                    seconds[variant].append(time.process_time() - start)
                    print(f"{name}, step {checkpoint.step}: {variant}: {sum(seconds[variant]):.0f} s", flush=True)
    return Measured(np.array([c.mean_lr for c in checkpoints]), parts, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--proxy", help="a smaller model that scores in the model's place")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--layers", type=int, nargs="*", default=[8])
    parser.add_argument("--caps", type=int, nargs="*", default=[32])
    parser.add_argument("--shots", type=int, default=2, help="pairs a task")
    parser.add_argument("--pairs", type=int, help="so many pairs at most, of the first tasks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cheaper.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    messages = []
    for name in ("alpaca", "gsm8k", "cot", "shp"):
        pool = load_pool(str(args.data / f"{name}.jsonl"))
        messages += [pool.messages(i) for i in range(args.rows // 4)]
    target = load_target(str(args.data / "target.jsonl"))
    target = target.take(np.array(first_of_each(target.tasks, args.shots)[: args.pairs]))
    variants: dict[str, dict[str, Any]] = {"all layers": {}}
    variants |= {f"top {k} layers": {"last_layers": k} for k in args.layers}
    variants |= {f"cap {s}": {"cap": s} for s in args.caps}
    found = measure(args.model, messages, target, variants)
    many = len(found.lr)
    exact, whole = found.score("all layers", many), found.cost("all layers", many)
    scores = [(v, n, found.score(v, n), found.cost(v, n)) for v in variants for n in (many, 2, 1)]
    if args.proxy:
        proxy = measure(args.proxy, messages, target, {"all layers": {}})
        scores += [(f"proxy {args.proxy}", n, proxy.score("all layers", n), proxy.cost("all layers", n))
                   for n in (many, 2, 1)]  # fmt: skip
    table, top = [], max(1, len(messages) // 20)
    for name, last, got, seconds in scores:
        same = len(set(np.argsort(-got)[:top]) & set(np.argsort(-exact)[:top])) / top
        rank, cost = float(spearmanr(got, exact).statistic), seconds / whole
        table.append({"variant": name, "checkpoints": last, "cost": cost, "spearman": rank, "top5_overlap": same})
        print(f"| {name} | {last} | {cost:.2f} | {rank:.3f} | {same:.2f} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    context = {
        "date": datetime.date.today().isoformat(),
        "model": args.model,
        "rows": len(messages),
        "pairs": len(target),
        "threads": args.threads,
    }
    args.out.write_text(json.dumps({"context": context, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
