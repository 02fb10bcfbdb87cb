"""What keepset is held against: plain padded batches through transformers' own passes, and the rows of both sides.

    two_forwards       adapter off and on, full logits, summed losses of every row
    forward_backward   full logits, loss.backward()
    race               either of them beside keepset, each at the token budget that suits it

Both run transformers + PEFT + sdpa on length-bucketed batches of at most so many padded tokens, on the model's device.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import zstandard

from keepset.memory import Count, free_memory
from keepset.model.encode import Encoded
from keepset.stopping import out_of_memory

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "alpaca" / "alpaca_union.jsonl.zst"


def read_rows(path: Path, n: int, *, seed: int = 0, between: str = "\n") -> list[list[dict[str, str]]]:
    """Draw n Alpaca rows and turn them into a question and an answer; `between` joins instruction and input."""
    if not path.exists():
        sys.exit(f"{path}: no data; give --data or set KEEPSET_BENCH_DATA to an Alpaca .jsonl or .jsonl.zst")
    raw = path.open("rb")
    stream: Any = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
    lines = [line for line in io.TextIOWrapper(stream, encoding="utf-8") if line.strip()]
    rows = []
    for i in np.random.default_rng(seed).permutation(len(lines))[:n]:
        row = json.loads(lines[int(i)])
        question = row["instruction"] + (f"{between}{row['input']}" if row.get("input") else "")
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])
    return rows


def draw_b(peft: Any, spread: float) -> Any:
    """Give a LoRA a B that isn't zero, so that the adapter changes the numbers; returns the model in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return peft.eval()


def bucketed(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Batches of at most so many padded tokens, longest rows first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(i)
    return [np.asarray(b) for b in batches]


def padded(rows: Sequence[Encoded], index: np.ndarray, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels, as a data collator makes them."""
    width = max(len(rows[i].input_ids) for i in index)
    ids = torch.zeros(len(index), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for r, i in enumerate(index):
        n = len(rows[i].input_ids)
        ids[r, :n] = torch.from_numpy(rows[i].input_ids.astype(np.int64))
        mask[r, :n] = 1
        labels[r, :n] = torch.where(torch.from_numpy(rows[i].supervised), ids[r, :n], -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def row_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of each padded row."""
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="none"
    )
    return flat.view(len(labels), -1).sum(1)


def twice(model: Any, one_pass: Callable[[], np.ndarray]) -> np.ndarray:
    """Adapter off, adapter on."""
    with torch.no_grad():
        with model.disable_adapter():
            off = one_pass()
        return np.stack([off, one_pass()])


def two_forwards(model: Any, rows: Sequence[Encoded], token_budget: int) -> np.ndarray:
    """Losses (2, n) of rows, adapter off and on; read back at the end."""
    device = next(model.parameters()).device

    def one_pass() -> np.ndarray:
        out, losses = np.zeros(len(rows)), []
        batches = bucketed([len(r.input_ids) for r in rows], token_budget)
        for index in batches:
            batch = padded(rows, index, device)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            losses.append(row_loss(logits, batch["labels"]))
        for index, found in zip(batches, losses, strict=True):
            out[index] = found.float().cpu().numpy()
        return out

    return twice(model, one_pass)


def forward_backward(model: Any, rows: Sequence[Encoded], token_budget: int) -> None:
    """Forward and backward as users run it."""
    device = next(model.parameters()).device
    for index in bucketed([len(x.input_ids) for x in rows], token_budget):
        model(**padded(rows, index, device), use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


Run = Callable[[list[Encoded], int], Any]
"""Something done with rows at a token budget."""


@dataclass(frozen=True)
class Search:
    """Token budgets from and to, seconds after which no larger one is tried, and repetitions."""

    first: int = 1 << 12
    last: int = 1 << 20
    seconds: float = 30.0
    rounds: int = 3


def tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.input_ids) for row in rows)


def repeated(rows: list[Encoded], n: int) -> list[Encoded]:
    """At least n tokens: the rows again and again."""
    whole, rest = divmod(n, tokens(rows))
    return rows * whole + rows[: 1 + int(np.searchsorted(np.cumsum([len(row.input_ids) for row in rows]), rest))]


def clocked(device: str, run: Run, some: list[Encoded], budget: int) -> tuple[float, float | None]:
    """Seconds until the device is done, and the most GiB that it held."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run(some, budget)
    if device == "cpu":
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30


def best_budget(run: Run, rows: list[Encoded], device: str, search: Search) -> dict[str, Any]:
    """Double the token budget until memory says stop, two doublings bring nothing, or time is up."""
    points: list[dict[str, Any]] = []
    stopped, budget, began = "the largest budget tried", search.first, time.perf_counter()
    run(rows[:1], budget)
    while budget <= search.last:
        some, halved, took = repeated(rows, 2 * budget), Count.total, []
        try:
            took = [clocked(device, run, some, budget) for _ in range(min(2, search.rounds))]
        except Exception as trouble:
            if not out_of_memory(trouble):
                raise
        if not took or Count.total > halved:
            stopped = "memory"
            break
        seconds, gib = min(took)
        points.append({"token_budget": budget, "tokens_per_second": tokens(some) / seconds, "peak_gib": gib})
        rates = [p["tokens_per_second"] for p in points]
        if len(rates) > 2 and max(rates[-2:]) < 1.03 * max(rates[:-2]):
            stopped = "growth"
            break
        if time.perf_counter() - began > search.seconds:
            stopped = "time"
            break
        budget *= 2
    free_memory()
    if not points:
        sys.exit(f"memory ends below a token budget of {budget}: nothing to measure")
    return {"best": max(points, key=lambda p: p["tokens_per_second"]), "stopped_by": stopped, "points": points}


def race(ours: Run, floor: Run, rows: list[Encoded], device: str, search: Search) -> dict[str, Any]:
    """Both at the budget that suits them, on the same rows, interleaved."""
    sides = {"keepset": ours, "floor": floor}
    curves = {side: best_budget(run, rows, device, search) for side, run in sides.items()}
    budgets = {side: curve["best"]["token_budget"] for side, curve in curves.items()}
    some = repeated(rows, 2 * max(budgets.values()))
    took = [
        {side: clocked(device, run, some, budgets[side])[0] for side, run in sides.items()}
        for _ in range(search.rounds)
    ]
    ratios = [seconds["keepset"] / seconds["floor"] for seconds in took]
    rates = {side: tokens(some) / statistics.median(seconds[side] for seconds in took) for side in sides}
    spread = [min(ratios), max(ratios)]
    return {**rates, "over_floor": statistics.median(ratios), "over_floor_range": spread, "curves": curves}
