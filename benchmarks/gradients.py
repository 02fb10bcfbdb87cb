"""Gradient scoring over the floor: a plain length-bucketed padded forward + backward of the same rows and LoRA.

Run `python benchmarks/gradients.py` (about 10 minutes on two quiet cores). Real Alpaca rows, SmolLM2-135M-Instruct,
LoRA on q, k, v, o. What is timed is `influence`: Adam map, dots with 10 target vectors, norms, momentum share.
Repetitions are interleaved and the ratio is taken inside each one, so that a busy machine disturbs both sides. Medians
of the clock's and of the processor time's ratio are reported; the headline is the worse of the two, since on a busy
machine the clock can flatter either side. Adam's moments are those of real gradients of other rows.

    floor        transformers + PEFT + sdpa, batches of at most 1,024 padded tokens, full logits, loss.backward()
    arithmetic   the operations the rows need (cost.py's rule, LoRA's included) at the matmul rate measured here
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from padded import DATA, HERE, bucketed, draw_b, forward_backward, read_rows, timed
from safetensors.numpy import load_file

from keepset.features.adam import AdamState, map_gradient
from keepset.features.gradient_store import GradientStore, build_store
from keepset.features.gradients import mean_weights, recording, run_rows
from keepset.features.influence import influence
from keepset.features.projection import ProjectedTarget, project_target, store_error, target_lengths
from keepset.features.recorded import products
from keepset.features.targets import GradientTarget, target_vectors
from keepset.model.encode import Encoded, encode_all
from keepset.model.flops import matrix_weights
from keepset.model.load import apply_lora, load
from keepset.model.pack import plan_batches
from keepset.model.prefix import common_prefix
from keepset.recipe import LoraSpec, ModelSpec

BUDGET = 1024
TARGETS = 10


def prepare(r: int, data: Path, n: int) -> tuple[Any, list[Encoded]]:
    """SmolLM2 with a LoRA whose B is not zero, and n rows of at most 512 tokens."""
    loaded = load(ModelSpec(model_name_or_path="demo", max_length=512))
    questions = read_rows(data, n + n // 10 + 8, between="\n\n")
    rows = [x for x in encode_all(loaded.encoder, questions)[0] if x is not None][:n]
    return draw_b(apply_lora(loaded.model, LoraSpec(lora_r=r, lora_alpha=2 * r), 0), 0.01), rows


def moments(model: Any, rows: list[Encoded]) -> AdamState:
    """First and second moments of the gradients of some rows: of the right size, though of no training run."""
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}

    def sink(name: str, left: Any, right: Any, scale: float, places: Any) -> None:
        g = products(left, right, places, torch.empty(len(places.lengths), left.shape[1], right.shape[1])) * scale
        first[name], second[name] = g.mean(0), g.square().mean(0)

    with recording(model) as recorder:
        run_rows(model, recorder, rows, mean_weights, sink)
    return AdamState(first, second, 50)


def matmul_rate() -> float:
    """Best multiply-add rate (2 operations each) of float32 matmuls of the model's own shapes, operations a second."""
    best = 0.0
    for rows, inner, outer in ((1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576)):
        x, w = torch.randn(rows, inner), torch.randn(outer, inner)
        for _ in range(8):
            seconds, _cpu = timed(lambda x=x, w=w: torch.nn.functional.linear(x, w))
            best = max(best, 2 * rows * inner * outer / seconds)
    return best


def arithmetic(model: Any, rows: list[Encoded], shapes: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """Operations of the floor (padded, all positions) and of ours (packed, head where supervised)."""
    blocks, head = matrix_weights(model)
    lora = sum(a * b for a, b in shapes.values())
    lengths = [len(x.input_ids) for x in rows]
    padded = sum(len(b) * lengths[b[0]] for b in bucketed(lengths, BUDGET))
    theirs = 4.0 * (blocks + head) * padded + 6.0 * lora * padded
    forward = backward = 0
    for index in plan_batches(lengths, BUDGET):
        wide = sum(int(np.flatnonzero(rows[i].supervised)[-1]) for i in index)
        backward += wide
        forward += wide - (len(index) - 1) * common_prefix([rows[i] for i in index])
    supervised = sum(int(x.supervised.sum()) for x in rows)
    ours = 2.0 * blocks * (forward + backward) + 4.0 * head * supervised + 4.0 * lora * backward
    return theirs, ours


def sft_target(model: Any, rows: list[Encoded]) -> GradientTarget:
    return target_vectors(model, [(x, None) for x in rows], np.arange(len(rows)) % TARGETS, loss="sft", n_tasks=TARGETS)


def speed(r: int, data: Path, n: int, repetitions: int) -> dict[str, Any]:
    """Interleaved times of the floor and of `influence`."""
    model, rows = prepare(r, data, n + 2 * TARGETS)
    target, state = sft_target(model, rows[n:]), moments(model, rows[n : n + 8])
    rows = rows[:n]
    forward_backward(model, rows[:4], BUDGET)
    influence(model, rows[:4], target, adam=state, token_budget=BUDGET)
    pairs = []
    for _ in range(repetitions):
        pairs.append(
            (
                timed(lambda: forward_backward(model, rows, BUDGET)),
                timed(lambda: influence(model, rows, target, adam=state, token_budget=BUDGET)),
            )
        )
        print(f"  r = {r}: floor {pairs[-1][0][0]:.1f} s, ours {pairs[-1][1][0]:.1f} s", flush=True)
    ratios = [ours[0] / base[0] for base, ours in pairs]
    shapes = {name: tuple(b.shape[1:]) for name, b in target.blocks.items()}
    theirs, mine = arithmetic(model, rows, shapes)  # type: ignore[arg-type]
    rate = matmul_rate()
    lengths = [len(x.input_ids) for x in rows]
    padded = sum(len(b) * lengths[b[0]] for b in bucketed(lengths, BUDGET))
    found = {
        "rows": n,
        "tokens": sum(lengths),
        "supervised_share": sum(int(x.supervised.sum()) for x in rows) / sum(lengths),
        "padding_waste": padded / sum(lengths) - 1,
        "shared_prefix_tokens": common_prefix(rows),
        "floor_seconds": statistics.median(base[0] for base, _ in pairs),
        "seconds": statistics.median(ours[0] for _, ours in pairs),
        "over_floor": statistics.median(ratios),
        "over_floor_range": [min(ratios), max(ratios)],
        "over_floor_cpu": statistics.median(ours[1] / base[1] for base, ours in pairs),
        "floor_gflop": theirs / 1e9,
        "gflop": mine / 1e9,
        "matmul_gflop_per_second": rate / 1e9,
        "time_at_matmul_rate": mine / rate,
        "repetitions": repetitions,
    }
    if r == 8:
        found["store_build_over_streaming"] = build_time(model, rows, target, state)
    return found


def build_time(model: Any, rows: list[Encoded], target: GradientTarget, state: AdamState) -> float:
    """Building the store over streaming the scores, median of 2 interleaved."""
    ratios = []
    ids = [str(i) for i in range(len(rows))]
    for _ in range(2):
        stream, _ = timed(lambda: influence(model, rows, target, adam=state, token_budget=BUDGET))
        with tempfile.TemporaryDirectory() as folder:
            store = GradientStore.create(folder, {}, dim=8192)
            build, _ = timed(lambda store=store: build_store(store, model, rows, ids, adam=state, token_budget=BUDGET))
        ratios.append(build / stream)
    return statistics.median(ratios)


def largest_error(data: Path, n: int = 6) -> float:
    """Largest relative error of dots and norms against autograd on one row at a time, r = 8, Adam map, float32."""
    model, rows = prepare(8, data, n + 2 * TARGETS)
    target, state = sft_target(model, rows[n:]), moments(model, rows[n : n + 8])
    rows = rows[:n]
    names = list(target.blocks)
    parameters = dict(model.named_parameters())
    dots, norms = np.zeros((n, TARGETS)), np.zeros(n)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.supervised)[None], ids, -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        for name, g in zip(names, torch.autograd.grad(loss, [parameters[k] for k in names]), strict=True):
            mapped = map_gradient("adam", state, name, g).double()
            dots[i] += (target.blocks[name].double() * mapped).flatten(1).sum(1).numpy()
            norms[i] += float(mapped.square().sum())
    found = influence(model, rows, target, adam=state, token_budget=BUDGET)
    norms = np.sqrt(norms)
    return float(max(np.abs(found.dots - dots).max() / np.abs(dots).max(), np.abs(found.norms / norms - 1).max()))


def store(data: Path, n: int) -> dict[str, Any]:
    """Spearman of the store's cosines with the exact ones at 1,024, 4,096 and 8,192 numbers a row; query time."""
    model, rows = prepare(8, data, n + 2 * TARGETS)
    target, state = sft_target(model, rows[n:]), moments(model, rows[n : n + 8])
    out: dict[str, Any] = {"rows": n}
    for kind in ("adam", "precondition"):
        exact, depends = influence(model, rows[:n], target, adam=state, map=kind, token_budget=BUDGET), {"map": kind}
        cosines = exact.dots / exact.norms[:, None]
        out[f"median_momentum_{kind}"] = float(np.median(exact.momentum))
        with tempfile.TemporaryDirectory() as folder:
            kept = GradientStore.create(folder, depends, dim=8192, map=kind)
            build_store(kept, model, rows[:n], [str(i) for i in range(n)], adam=state, token_budget=BUDGET)
            projected = project_target(kept.sketch, target, map=kind, adam=state)
            found = kept.dots(projected)
            estimates = {8192: found, **folded(kept, projected)}
        for dim, dots in estimates.items():
            error = store_error(dots, exact.dots, exact.norms, target_lengths(target))
            top = max(1, n // 20)
            chosen = [set(np.argsort(-(dots[:, j] / exact.norms))[:top]) for j in range(TARGETS)]
            wanted = [set(np.argsort(-cosines[:, j])[:top]) for j in range(TARGETS)]
            out[f"spearman_{kind}_{dim}"] = float(np.median(error.spearman))
            out[f"top5_{kind}_{dim}"] = float(np.mean([len(a & b) / top for a, b in zip(chosen, wanted, strict=True)]))
            out[f"rms_{kind}_{dim}"] = error.rms
        out[f"spread_{kind}"] = float(np.std(cosines, axis=0).mean())
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        big = GradientStore.create(folder, {}, dim=8192)
        for k in range(0, 100_000, 5_000):
            part = rng.standard_normal((5_000, 8192), dtype=np.float32)
            big.write([str(i) for i in range(k, k + 5_000)], part, np.ones(5_000), np.zeros(5_000))
        query = ProjectedTarget(vectors_of(TARGETS), np.zeros(TARGETS))
        out["query_seconds_100k"] = timed(lambda: big.dots(query))[0]
        out["bytes_per_row"] = sum(p.stat().st_size for p in big.path.glob("[0-9]*")) / big.n_rows
    return out


def folded(kept: GradientStore, projected: ProjectedTarget) -> dict[int, np.ndarray]:
    """The dots of the same store at smaller sizes: buckets are taken modulo the size, so halves add up."""
    shards = [load_file(path) for path in sorted(kept.path.glob("*.safetensors"))]
    rows = np.concatenate([shard["rows"].astype(np.float32) * shard["scale"][:, None] for shard in shards])
    shared, vectors, found = np.concatenate([shard["shared"] for shard in shards]), projected.sketches, {}
    while rows.shape[1] > 1024:
        half = rows.shape[1] // 2
        rows, vectors = (x[:, :half] + x[:, half:] for x in (rows, vectors))
        found[half] = rows @ vectors.T + np.outer(shared, projected.shared)
    return found


def vectors_of(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 8192), dtype=np.float32)


def memory_child(n: int) -> None:
    """Score n rows of a small Llama and print this process' peak memory in KiB and the seconds."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import keepset.model.attention  # noqa: F401 - registers the packed attention

    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="keepset", dtype=torch.float32)
    peft = apply_lora(model, LoraSpec(lora_r=8, lora_alpha=16), 0).eval()
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        ids = rng.integers(3, 2048, int(rng.integers(8, 40))).astype(np.int32)
        rows.append(Encoded(ids, np.arange(len(ids)) > len(ids) // 2, False))
    target, state = sft_target(peft, rows[:TARGETS]), moments(peft, rows[:8])
    seconds, _ = timed(lambda: influence(peft, rows, target, adam=state, token_budget=BUDGET))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_kib": peak, "seconds": seconds, "tokens": sum(len(r.input_ids) for r in rows)}))


def memory() -> dict[str, Any]:
    """Peak memory and time at 500 and 5,000 rows, each in a fresh process."""
    found = {}
    for n in (500, 5000):
        out = subprocess.run(
            [sys.executable, __file__, "--memory-child", str(n)], capture_output=True, text=True, check=True
        )
        found[n] = json.loads(out.stdout.splitlines()[-1])
    small, large = found[500], found[5000]
    return {
        "growth": large["peak_kib"] / small["peak_kib"],
        "peak_mib_500": small["peak_kib"] / 1024,
        "peak_mib_5000": large["peak_kib"] / 1024,
        "seconds_per_token_5000_over_500": large["seconds"] / large["tokens"] / (small["seconds"] / small["tokens"]),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    for r in (8, 128):
        s = result.get(f"r{r}")
        if s is None:
            continue
        print(
            f"r = {r:3d}: {s['over_floor']:.3f} of the floor (processor time {s['over_floor_cpu']:.3f}; range "
            f"{s['over_floor_range'][0]:.2f}-{s['over_floor_range'][1]:.2f}); {s['rows']} rows, {s['tokens']} tokens, "
            f"{s['supervised_share']:.0%} supervised, padding waste of the floor {s['padding_waste']:.0%}, "
            f"shared beginning {s['shared_prefix_tokens']} tokens"
        )
        print(
            f"         {s['gflop']:.0f} GFLOP against {s['floor_gflop']:.0f} ({s['gflop'] / s['floor_gflop']:.2f}); at "
            f"{s['matmul_gflop_per_second']:.0f} GFLOP/s: {s['time_at_matmul_rate']:.1f} s of {s['seconds']:.1f} s"
        )
    for key in ("max_relative_error", "memory", "store"):
        if key in result:
            print(f"{key}: {json.dumps(result[key])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KEEPSET_BENCH_DATA", DATA)))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--store-rows", type=int, default=160)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["r8", "r128", "error", "memory", "store"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gradients.json")
    parser.add_argument("--memory-child", type=int)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if args.memory_child:
        memory_child(args.memory_child)
        return
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts:
        print(f"{part} ...", flush=True)
        if part in ("r8", "r128"):
            result[part] = speed(int(part[1:]), args.data, args.rows, args.repetitions)
            result[f"{part}_over_floor"] = max(result[part]["over_floor"], result[part]["over_floor_cpu"])
        elif part == "error":
            result["max_relative_error"] = largest_error(args.data)
        elif part == "memory":
            result["memory"] = memory()
            result["memory_growth"] = result["memory"]["growth"]
        elif part == "store":
            result["store"] = store(args.data, args.store_rows)
            result["store_spearman_8192"] = result["store"]["spearman_adam_8192"]
        result["context"] = {
            "date": datetime.date.today().isoformat(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
