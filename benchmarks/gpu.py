"""keepset on a GPU: are the numbers right, how fast is it, does the host wait? `make gpu-check`; or `--device cpu`.

    compare     losses, representations, gradients, target and influence of a tiny and the demo model, in float32 and
                bfloat16 on the device, against float32 on the CPU, one row at a time, by transformers' own passes
    throughput  tokens a second of losses and gradients beside padded batches through transformers' own passes, at token
                budgets that double until memory or growth ends; then both at their best, interleaved
    waits       calls in a batch that make the host wait for the GPU (torch.cuda.set_sync_debug_mode), and where
    workers     two `keepset work` on the one GPU against one `keepset run`

Both sides of `compare` have the same weights: those of the short dtype. Tolerances: float32 as in tests/tolerance.py.
In bfloat16 every result is rounded and sums run in float32, so roundings are counted in the place of terms; and the
error may be no more than four times that of transformers' own passes in bfloat16 on the same device.
Exits 1 if anything is out of tolerance. Writes benchmarks/results/gpu.json on a GPU; elsewhere only with --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from padded import HERE, Run, Search, draw_b, forward_backward, race, two_forwards

from conftest import save_tiny
from crash import write_inputs
from keepset.features.adam import AdamState, map_gradient
from keepset.features.influence import influence
from keepset.features.losses import row_losses
from keepset.features.representations import representations
from keepset.features.row_gradients import stacked_gradients
from keepset.features.targets import GradientTarget, target_vectors
from keepset.model.encode import Encoded, encode_all
from keepset.model.load import apply_lora, load, machine
from keepset.recipe import LoraSpec, ModelSpec
from slow_gradients import random_state
from tolerance import MAPPED, tolerance

DTYPES = ("float32", "bfloat16")
PARTS = ("compare", "throughput", "waits", "workers")
ROUNDINGS = 20
"""Results of one token's way through a layer that are rounded to the dtype: norms, projections, rotation, attention,
MLP, sums of the residual stream."""
PASSES = {"losses": (1, 1), "representations": (1, 1), "gradients": (3, 4), "target": (3, 4), "influence": (3, 8)}
"""Chains of sums over a forward pass's, and the condition of what follows; see tests/tolerance.py."""
Numbers = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """Models, rows compared, and how the search for the best token budgets goes."""

    models: tuple[str, ...] = ("tiny", "demo")
    rows: int = 16
    search: Search = Search()


ON_CPU = Sizes(rows=6, search=Search(128, 256, rounds=1))
QUICK = Sizes(("tiny",), 4, Search(128, 256, rounds=1))


def prepared(source: str, dtype: str, device: str) -> tuple[Any, list[Encoded]]:
    """A model as the product loads it, checked, with a LoRA on q, k, v, o; the demo pool's rows for it."""
    loaded = load(ModelSpec(model_name_or_path=source, dtype=dtype, device=device, max_length=512))
    lines = (files("keepset") / "demo" / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    chats = []
    for row in map(json.loads, lines):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": row["output"] or ""}])
    rows = [row for row in encode_all(loaded.encoder, chats)[0] if row is not None]
    return draw_b(apply_lora(loaded.model, LoraSpec(lora_r=8, lora_alpha=16), 0), 0.02), rows


def same_weights(truth: Any, model: Any) -> None:
    """Give both models the first one's weights, rounded to the second one's dtypes."""
    with torch.no_grad():
        for p, q in zip(truth.parameters(), model.parameters(), strict=True):
            q.copy_(p)
            p.copy_(q)


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    return {n: (p.shape[0], p.shape[1]) for n, p in model.named_parameters() if p.requires_grad}


def plain(model: Any, rows: Sequence[Encoded]) -> Numbers:
    """One row at a time through the model's own forward pass and autograd, in float64 after its logits.

    `losses` (n, 2), adapter off and on, `representations` (n, 2, d), last and weighted mean, `gradients` (n, p).
    """
    device, names = next(model.parameters()).device, list(shapes_of(model))
    parameters = [model.get_parameter(name) for name in names]
    numbers: dict[str, list[np.ndarray]] = {"losses": [], "representations": [], "gradients": []}

    def nll(ids: torch.Tensor, row: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        values = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), ids[1:], reduction="none")
        return values[torch.from_numpy(row.supervised[1:]).to(device)], out.hidden_states[-1][0].detach().double()

    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64)).to(device)
        with torch.no_grad(), model.disable_adapter():
            off = float(nll(ids, row)[0].sum())
        values, hidden = nll(ids, row)
        steps = torch.arange(1, len(ids) + 1, device=device, dtype=torch.float64)
        pooled = torch.stack([hidden[-1], (steps / steps.sum()) @ hidden])
        gradients = torch.autograd.grad(values.mean(), parameters)
        numbers["losses"].append(np.array([off, float(values.detach().sum())]))
        numbers["representations"].append(pooled.cpu().numpy())
        numbers["gradients"].append(np.concatenate([g.double().flatten().cpu().numpy() for g in gradients]))
    return {what: np.stack(parts) for what, parts in numbers.items()}


def reduced(numbers: Numbers, vectors: np.ndarray, state: AdamState) -> Numbers:
    """Add what follows from gradients (n, p).

    `target` (2, p): the last two at length 1; `influence` (n, 3): Adam-mapped dots with unit vectors (2, p), the norm.
    """
    mapped = []
    for g in numbers["gradients"]:
        parts = np.split(g, np.cumsum([m.numel() for m in state.exp_avg.values()])[:-1])
        blocks = {n: torch.from_numpy(x).view(m.shape) for x, (n, m) in zip(parts, state.exp_avg.items(), strict=True)}
        mapped.append(np.concatenate([map_gradient("adam", state, n, x).double().flatten() for n, x in blocks.items()]))
    dots = [np.append(vectors @ m, np.linalg.norm(m)) for m in mapped]
    return {**numbers, "target": unit(numbers["gradients"][-2:]), "influence": np.stack(dots)}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def engine(model: Any, rows: Sequence[Encoded], target: GradientTarget, state: AdamState, budget: int) -> Numbers:
    """The same numbers by keepset."""
    losses = row_losses(model, rows, token_budget=budget, adapters=(False, True)).nll.T
    pooled = [representations(model, rows, token_budget=budget, pooling=p) for p in ("last", "weighted_mean")]
    gradients = stacked_gradients(model, rows, token_budget=budget)
    own = target_vectors(model, [(row, None) for row in rows[-2:]], np.arange(2), loss="sft", token_budget=budget)
    scored = influence(model, rows, target, adam=state, token_budget=budget)
    flat = {"gradients": gradients, "target": {n: b.flatten(1) for n, b in own.blocks.items()}}
    return {
        "losses": losses, "representations": np.stack(pooled, 1).astype(np.float64),
        **{what: torch.cat([b.double().cpu() for b in parts.values()], 1).numpy() for what, parts in flat.items()},
        "influence": np.column_stack([scored.dots, scored.norms]),
    }  # fmt: skip


def error(what: str, got: np.ndarray, want: np.ndarray) -> float:
    """Largest relative error: of a loss, of a vector by its length, of an influence by the length of what is mapped."""
    if what == "losses":
        return float(np.max(np.abs(got - want) / want))
    if what == "influence":
        return float(np.max(np.abs(got - want) / want[:, -1:]))
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def allowed(what: str, config: Any, longest: int, dtype: torch.dtype, own: float | None) -> float:
    """Tolerance of a number that was computed in a dtype; `own`: the error of the model's own pass in it."""
    chains, condition = PASSES[what]
    d, layers = config.hidden_size, config.num_hidden_layers
    if dtype == torch.float32:
        terms = layers * (7 * d + longest + config.intermediate_size) + 2 * d + config.vocab_size
        return tolerance(chains * terms, condition)
    most = tolerance(chains * ROUNDINGS * layers, condition) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return most if own is None else min(most, 4 * own)


def compare(name: str, source: str, device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Every number of one model in both dtypes, with its error and tolerance."""
    table = []
    for dtype in DTYPES:
        truth, rows = prepared(source, "float32", "cpu")
        rows = sorted(rows, key=lambda row: len(row.input_ids))[: sizes.rows]
        longest = len(rows[-1].input_ids)
        model = prepared(source, dtype, device)[0]
        same_weights(truth, model)
        shapes = shapes_of(truth)
        state, right = random_state(shapes), plain(truth, rows)
        vectors = unit(right["gradients"][:2])
        pieces = np.split(vectors, np.cumsum([a * b for a, b in shapes.values()])[:-1], axis=1)
        blocks = {n: torch.from_numpy(x).float().view(2, *s) for x, (n, s) in zip(pieces, shapes.items(), strict=True)}
        target = GradientTarget(blocks, np.arange(2), *(np.zeros(2) for _ in range(3)))
        right = reduced(right, vectors, state)
        own = {} if dtype == "float32" else reduced(plain(model, rows), vectors, state)
        got = engine(model, rows, target, state, 3 * longest)
        again = {} if device == "cpu" else engine(model, rows, target, state, 3 * longest)
        for what in PASSES:
            theirs = error(what, own[what], right[what]) if own else None
            most = allowed(what, model.config.get_text_config(), longest, getattr(torch, dtype), theirs)
            off = error(what, got[what], right[what])
            same = again[what].tobytes() == got[what].tobytes() if again else None
            table.append({"model": name, "dtype": dtype, "what": what, "error": off, "tolerance": most,
                          "right": off <= most, "error_of_transformers": theirs, "same_bytes_again": same})  # fmt: skip
    return table


def throughput(source: str, dtype: str, device: str, sizes: Sizes) -> dict[str, Any]:
    """Losses, adapter off and on, beside two forwards; Adam-mapped dots with 10 targets beside forward and backward."""
    model, rows = prepared(source, dtype, device)
    calls = scoring(model, rows[:10])
    floors: dict[str, Run] = {
        "losses": lambda some, b: two_forwards(model, some, b),
        "gradients": lambda some, b: forward_backward(model, some, b),
    }
    return {what: race(calls[what], floor, rows, device, sizes.search) for what, floor in floors.items()}


def scoring(model: Any, targets: list[Encoded]) -> dict[str, Run]:
    """What the passes over a pool call, shard by shard; each target row is a task."""
    state = random_state(shapes_of(model))
    target = target_vectors(model, [(row, None) for row in targets], np.arange(len(targets)), loss="sft")
    return {
        "losses": lambda some, b: row_losses(model, some, token_budget=b, adapters=(False, True)),
        "representations": lambda some, b: representations(model, some, token_budget=b),
        "gradients": lambda some, b: influence(model, some, target, adam=state, token_budget=b),
    }


def waiting(run: Run, some: list[Encoded], budget: int) -> Counter[str]:
    """File and line of every call that made the host wait for the GPU, as torch warns of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(some, budget)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in places)


def waits(source: str, device: str) -> dict[str, Any]:
    """Waits of the host a batch and a call, from calls of 4 and of 8 batches of four equal rows."""
    if device == "cpu":
        return {"counted": False, "why": "torch counts them on CUDA alone"}
    model, rows = prepared(source, "float32", device)
    table: dict[str, Any] = {"counted": True}
    for what, run in scoring(model, rows[:1]).items():
        run(rows[:1] * 16, 4 * len(rows[0].input_ids))
        few, many = (waiting(run, rows[:1] * n, 4 * len(rows[0].input_ids)) for n in (16, 32))
        a_batch = (many.total() - few.total()) / 4
        table[what] = {"a_batch": a_batch, "a_call": few.total() - 4 * a_batch,
                       "places_a_batch": {place: n / 4 for place, n in (many - few).most_common(8)}}  # fmt: skip
    return table


def workers(folder: Path, device: str) -> dict[str, Any]:
    """Scores of two `keepset work` that share the device, against those of one `keepset run` with the same warm-up."""
    import pyarrow.parquet as pq

    model = {"model_name_or_path": str(folder / "model"), "max_length": 200, "device": device}
    methods, batching = ["perplexity", "rds", "less"], {"token_budget": 256, "shard_rows": 3}
    changes: dict[str, Any] = {"model": model, "methods": methods, "batching": batching}
    keepset, log = [sys.executable, "-m", "keepset"], folder.with_suffix(".log").open("w+")
    codes = [subprocess.run([*keepset, "run", str(write_inputs(folder, **changes))], stdout=log, stderr=log).returncode]
    changes |= {"run_dir": str(folder / "two"), "warmup": {"path": str(folder / "run/models/warmup")}}
    command = [*keepset, "work", str(write_inputs(folder, **changes))]
    codes += [p.wait() for p in [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(2 * (codes == [0]))]]
    if any(codes):
        log.seek(0)
        return {"right": False, "exit_codes": codes, "log": log.read()[-2000:]}
    off = {}
    for method in methods:
        files = (folder / run / "scores" / f"{method}.parquet" for run in ("run", "two"))
        a, b = (pq.read_table(path).sort_by("id")["score"].to_numpy() for path in files)
        off[method] = float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(a)))
    return {"right": all(x <= MAPPED for x in off.values()), "error": off, "tolerance": MAPPED}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for row in result.get("compare", []):
        theirs = f" (transformers' own {row['error_of_transformers']:.1e})" if row["error_of_transformers"] else ""
        again = {True: ", same bytes again", False: ", OTHER BYTES AGAIN"}.get(row["same_bytes_again"], "")
        found = f"off by {row['error']:.1e} of {row['tolerance']:.1e}{'' if row['right'] else ' WRONG'}"
        print(f"{row['model']:5s} {row['dtype']:9s} {row['what']:16s} {found}{theirs}{again}")
    for dtype, table in result.get("throughput", {}).items():
        for what, t in table.items():
            print(f"{dtype} {what}: {t['over_floor']:.2f} of the floor's time {t['over_floor_range']}")
            for side, curve in t["curves"].items():
                best, ended = curve["best"], curve["stopped_by"]
                at = f"token budget {best['token_budget']}, peak {best['peak_gib']} GiB, search ended by {ended}"
                print(f"    {side:8s} {t[side]:10,.0f} tokens a second, {at}")
    for part in ("waits", "workers", "context"):
        if part in result:
            print(f"{part}: {json.dumps(result[part])}")


def context(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    made_with = {**machine(ModelSpec(device=device)), "date": datetime.date.today().isoformat(),
                 "python": platform.python_version(), "cores": os.cpu_count(),
                 "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # fmt: skip
    del made_with["dtype"]
    if device == "cpu":
        return made_with
    card = torch.cuda.get_device_properties(device)
    return {**made_with, "cuda": torch.version.cuda, "capability": f"{card.major}.{card.minor}",
            "gib": card.total_memory / 2**30, "float32_matmul": torch.get_float32_matmul_precision()}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 where all is right, 1 where a number is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="the tiny model alone, without `workers`")
    parser.add_argument("--parts", nargs="+", default=None, choices=PARTS)
    parser.add_argument("--out", type=Path, default=None, help="default: results/gpu.json, after all parts on a GPU")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU: install its CUDA build, or try with --device cpu")
    began, sizes = time.perf_counter(), QUICK if args.quick else ON_CPU if cpu else Sizes()
    parts = args.parts or [p for p in PARTS if not args.quick or p != "workers"]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        threads = torch.get_num_threads()
        save_tiny(Path(name) / "tiny", max_position_embeddings=512)
        torch.set_num_threads(threads)
        sources = {model: str(Path(name) / "tiny") if model == "tiny" else model for model in sizes.models}
        largest = sources[sizes.models[-1]]
        if "compare" in parts:
            result["compare"] = [row for m, source in sources.items() for row in compare(m, source, args.device, sizes)]
        if "throughput" in parts:
            dtypes = DTYPES[:1] if cpu else DTYPES
            result["throughput"] = {dtype: throughput(largest, dtype, args.device, sizes) for dtype in dtypes}
        if "waits" in parts:
            result["waits"] = waits(largest, args.device)
        if "workers" in parts:
            result["workers"] = workers(Path(name) / "shared", args.device)
    result["context"] = {**context(args.device), "seconds": round(time.perf_counter() - began)}
    show(result)
    out = args.out or (None if cpu or args.quick or args.parts else HERE / "results" / "gpu.json")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
    checked = [*result.get("compare", []), *([result["workers"]] if "workers" in result else [])]
    wrong = sum(not one["right"] for one in checked)
    print(f"{wrong} comparisons are out of tolerance" if wrong else "all comparisons are within tolerance")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
