"""Scoring rows under a base and its LoRA: keepset against two plain padded forward passes and against the usual tools.

Run `python benchmarks/losses.py` (about 15 minutes on two cores). All contenders score the same encoded rows with the
same model in memory and the same LoRA (r = 8 on q, k, v, o; random B), adapter off and adapter on; repetitions are
interleaved and the ratio is taken inside each repetition, so a busy machine disturbs both sides.

    two forwards    HF + PEFT + sdpa, length-bucketed padded batches of at most 1,024 tokens, full logits, per-row sums
    Trainer         transformers.Trainer.predict, batch 8 in the given order, prediction_step that returns row losses
    lm-eval-like    what HFLM.loglikelihood does (0.4.13): longest first, batch 8, log_softmax of full logits, argmax
    one row         model(input_ids, labels) row by row

Peak memory is the high-water mark of a fresh process that loads Gemma and scores batches of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from padded import DATA, HERE, bucketed, draw_b, padded, read_rows, row_loss, twice, two_forwards

from keepset.features.losses import row_losses
from keepset.model import pack as packing
from keepset.model.encode import Encoded, encode_all
from keepset.model.load import apply_lora, load
from keepset.model.pack import bare, needed, plan_batches
from keepset.model.passes import Shortcuts
from keepset.model.prefix import plan
from keepset.recipe import LoraSpec, ModelSpec

BUDGET = 1024


def prepare(name: str, data: Path, n: int) -> tuple[Any, list[Encoded]]:
    """Load a model with a LoRA that really changes its numbers, and encode n rows that fit."""
    loaded = load(ModelSpec(model_name_or_path=name))
    rows = [r for r in encode_all(loaded.encoder, read_rows(data, 2 * n))[0] if r is not None][:n]
    return draw_b(apply_lora(loaded.model, LoraSpec(lora_r=8, lora_alpha=16), 0), 0.02), rows


def one_row(model: Any, rows: list[Encoded]) -> np.ndarray:
    def one_pass() -> np.ndarray:
        out = []
        for i in range(len(rows)):
            batch = padded(rows, np.asarray([i]))
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
            out.append(loss.item() * int(rows[i].supervised.sum()))
        return np.asarray(out)

    return twice(model, one_pass)


def lm_eval_like(model: Any, rows: list[Encoded]) -> np.ndarray:
    def one_pass() -> np.ndarray:
        out = np.zeros(len(rows))
        order = np.asarray(sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids)))
        for start in range(0, len(order), 8):
            index = order[start : start + 8]
            batch = padded(rows, index)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            scores = torch.log_softmax(logits, dim=-1)
            for r, i in enumerate(index):
                t = torch.from_numpy(np.flatnonzero(rows[i].supervised))
                wanted = scores[r, t - 1]
                target = batch["input_ids"][r, t]
                (wanted.argmax(-1) == target).all().item()
                out[i] = -wanted.gather(-1, target[:, None]).sum().item()
        return out

    return twice(model, one_pass)


def trainer_predict(model: Any, rows: list[Encoded]) -> np.ndarray:
    from transformers import Trainer, TrainingArguments

    class PerRow(Trainer):
        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                losses = row_loss(logits, inputs["labels"])
            return losses.mean(), losses, inputs["labels"][:, :1]

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_eval_batch_size=8,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        dataset: Any = list(range(len(rows)))
        trainer = PerRow(model=model, args=args, data_collator=lambda some: padded(rows, np.asarray(some)))
        return twice(model, lambda: np.asarray(trainer.predict(dataset).predictions, dtype=np.float64))


def keepset(model: Any, rows: list[Encoded], **taken: bool) -> np.ndarray:
    return row_losses(model, rows, token_budget=BUDGET, adapters=(False, True), shortcuts=Shortcuts(**taken)).nll


def measure(model: Any, rows: list[Encoded], contenders: dict[str, tuple[Callable[..., np.ndarray], int]]) -> dict:
    """Time every contender, interleaved; contender -> (function, repetitions)."""
    inner = bare(model)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, np.ndarray] = {}
    for repetition in range(1 + max(n for _, n in contenders.values())):
        for name, (function, repetitions) in contenders.items():
            if repetition > repetitions:
                continue
            ours = name.startswith("keepset")
            inner.set_attn_implementation("keepset" if ours else "sdpa")
            some = rows if repetition else rows[:2]  # repetition 0 warms up
            start, start_cpu = time.perf_counter(), time.process_time()
            result = function(model, some)
            seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - start_cpu
            if repetition:
                times[name].append(seconds)
                cpu[name].append(seconds_cpu)
                results[name] = result
                print(f"  {repetition} {name:24s} {seconds:7.2f} s wall {seconds_cpu:7.2f} s CPU", flush=True)
    floor = times["two forwards"]
    table = {}
    for name, seconds in times.items():
        ratios = [s / f for s, f in zip(seconds, floor, strict=False)]
        cpu_ratios = [s / f for s, f in zip(cpu[name], cpu["two forwards"], strict=False)]
        difference = np.abs(results[name] / results["two forwards"] - 1).max()
        table[name] = {
            "seconds": round(statistics.median(seconds), 3),
            "over_two_forwards": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
            "cpu_over_two_forwards": round(statistics.median(cpu_ratios), 4),
            "worse_ratio": round(max(statistics.median(ratios), statistics.median(cpu_ratios)), 4),
            "repetitions": len(ratios),
            "max_relative_difference": float(f"{difference:.2g}"),
        }
    return table


def describe(model: Any, rows: list[Encoded]) -> dict[str, Any]:
    """What the ratio depends on: supervised share, padding waste of the plain pass, tokens a shared beginning saves."""
    lengths = [len(r.input_ids) for r in rows]
    real = sum(lengths)
    plain = sum(len(b) * max(lengths[i] for i in b) for b in bucketed(lengths, BUDGET))
    made = list(plan(rows, BUDGET, share=True, span=packing.full_span(model)))
    run = sum(p + sum(needed(rows[i]) - p for i in index) for index, p in made)
    return {
        "rows": len(rows),
        "tokens": real,
        "supervised_share": round(sum(int(r.supervised.sum()) for r in rows) / real, 4),
        "padding_waste_of_two_forwards": round(plain / real - 1, 4),
        "tokens_saved_by_shared_beginnings_and_ends": round(1 - run / real, 4),
        "batches": len(made),
        "batches_unshared": len(plan_batches(lengths, BUDGET)),
    }


def show(title: str, about: dict[str, Any], table: dict[str, Any]) -> None:
    print(f"\n{title}: " + ", ".join(f"{k} {v}" for k, v in about.items()))
    for name, row in sorted(table.items(), key=lambda item: item[1]["over_two_forwards"]):
        low, high = row["range"]
        print(
            f"  {name:24s} {row['seconds']:8.2f} s   {row['over_two_forwards']:.3f} [{low:.3f}, {high:.3f}] of two,"
            f" CPU {row['cpu_over_two_forwards']:.3f},"
            f" max rel. difference {row['max_relative_difference']:.1e}"
        )


def speedup(table: dict[str, Any], other: str) -> float:
    """How much faster keepset is than another contender, by wall or CPU time, whichever says less."""
    ours = table["keepset"]
    ratios = [table[other][key] / ours[key] for key in ("over_two_forwards", "cpu_over_two_forwards")]
    return round(min(ratios), 3)


def write(path: Path, result: dict[str, Any]) -> None:
    """Merge into the results file, so that one model can be measured again alone."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **result}, indent=1) + "\n")
    print(f"\nwritten: {path}", flush=True)


def peak(data: Path, rows_wanted: int) -> dict[str, float]:
    """Load Gemma, score two full batches; high-water marks in GiB."""

    def high_water() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    model, rows = prepare("gemma3-270m-demo", data, rows_wanted)
    after_load = high_water()
    keepset(model, rows)
    return {"gemma_peak_gib": round(high_water(), 3), "gemma_peak_gib_after_load": round(after_load, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KEEPSET_BENCH_DATA", DATA)))
    parser.add_argument("--rows", type=int, default=32, help="rows for SmolLM2")
    parser.add_argument("--gemma-rows", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--others", type=int, default=2, help="repetitions of the other tools")
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma"], choices=["smollm2", "gemma"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "losses.json")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(args.data, args.gemma_rows)))
        return
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "threads": args.threads}
    result |= {"torch": torch.__version__, "processor_load": round(os.getloadavg()[0], 1)}
    n, m = args.repetitions, args.others
    if "smollm2" in args.models:
        model, rows = prepare("demo", args.data, args.rows)
        contenders: dict[str, tuple[Callable[..., np.ndarray], int]] = {
            "two forwards": (lambda m, r: two_forwards(m, r, BUDGET), n),
            "keepset": (keepset, n),
            "Trainer.predict": (trainer_predict, m),
            "lm-eval-like": (lm_eval_like, m),
            "one row": (one_row, m),
            "keepset, nothing shared": (lambda m, r: keepset(m, r, prefix=False), 1),
            "keepset, LoRA not merged": (lambda m, r: keepset(m, r, merge=False), 1),
            "keepset, the model's own blocks": (lambda m, r: keepset(m, r, written=False), 1),
        }
        about, table = describe(model, rows), measure(model, rows, contenders)
        show("SmolLM2-135M-Instruct", about, table)
        speedups = {k: speedup(table, k) for k in ("Trainer.predict", "lm-eval-like", "one row")}
        result |= {
            "smollm2_over_two_forwards": table["keepset"]["worse_ratio"],
            "speedup_over_trainer_predict": speedups["Trainer.predict"],
            "speedup_over_lm_eval_like": speedups["lm-eval-like"],
            "speedup_over_one_row": speedups["one row"],
            "speedup_over_fastest_other": min(speedups.values()),
            "smollm2": {"about": about, "table": table},
        }
        write(args.out, result)
        del model
    if "gemma" in args.models:
        model, rows = prepare("gemma3-270m-demo", args.data, args.gemma_rows)
        contenders = {
            "two forwards": (lambda m, r: two_forwards(m, r, BUDGET), n),
            "keepset": (keepset, n),
            "keepset, nothing shared": (lambda m, r: keepset(m, r, prefix=False), 1),
        }
        about, table = describe(model, rows), measure(model, rows, contenders)
        show("Gemma 3 270M", about, table)
        del model
        command = [sys.executable, __file__, "--peak", "--data", str(args.data), "--gemma-rows", str(args.gemma_rows)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()
        memory = json.loads(lines[-1])
        print(f"  peak memory of a fresh process: {memory['gemma_peak_gib']} GiB")
        about |= {"token_budget": BUDGET}
        result |= {
            "gemma_over_two_forwards": table["keepset"]["worse_ratio"],
            **memory,
            "gemma": {"about": about, "table": table},
        }
        write(args.out, result)


if __name__ == "__main__":
    main()
