"""DPO, IPO and DavIR-DPO on the same pairs: held-out accuracy, and how far each loss's margin follows the length gap.

python experiments/dpo-losses/run.py --pairs PAIRS.jsonl --out DIR [--train 64 --heldout 60 --seeds 0 1 2]

Pairs are any file keepset reads as a target. Every cell (loss, β, seed) is trained once and kept in DIR: a run that
broke goes on where it stopped. The table is printed and written to DIR/table.md, the numbers to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from keepset.adapters import attached
from keepset.data import load_target
from keepset.encoding import RowRefused
from keepset.evaluate.preference import pair_logps, preference_table
from keepset.model import load
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.preference import train_dpo

# What each loss pushes up, and so what its own margin is.
FORM = {"dpo": "implicit_sum", "ipo": "implicit_mean", "dpo_mean": "implicit_mean", "davir": "implicit_relative"}
CELLS = ["dpo:0.1", "ipo:0.1", "dpo_mean:2", "davir:1", "davir:5", "davir:20", "davir:100"]


def draw_pairs(path: str, loaded, seed: int, n_train: int, n_heldout: int):
    """Draw disjoint training and held-out pairs over the sorted ids; pairs that share a prompt stay together."""
    target = load_target(path)
    order = np.argsort(target.ids, kind="stable")
    drawn = order[np.random.default_rng(seed).permutation(len(order))]
    train, heldout, prompts = [], [], set()
    for i in drawn:
        prompt, chosen, rejected = target.pair(int(i))
        try:
            pair = tuple(loaded.encoder.encode_pair(prompt, side) for side in (chosen, rejected))
        except RowRefused:
            continue
        key = json.dumps(prompt)
        if len(train) < n_train:
            train.append(pair)
            prompts.add(key)
        elif key not in prompts and len(heldout) < n_heldout:
            heldout.append(pair)
    return train, heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--heldout", type=int, default=60)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec(model_name_or_path=options.model, max_length=options.max_length)
    loaded, console = load(spec), Console(stderr=True)
    train, heldout = draw_pairs(options.pairs, loaded, 0, options.train, options.heldout)
    console.print(f"{len(train)} training pairs, {len(heldout)} held out")
    base = pair_logps(loaded.model, heldout)
    args = TrainSpec(
        num_train_epochs=options.epochs, learning_rate=options.learning_rate, per_device_train_batch_size=8
    )
    results = []
    for seed in options.seeds:
        for cell in options.cells:
            loss, beta = cell.split(":")
            out = options.out / f"{loss}-{beta}-seed{seed}"
            found = train_dpo(
                spec, LoraSpec(), train, out, args, loss=loss, beta=float(beta), seed=seed, console=console
            )
            with attached(loaded.model, out) as model:
                table = preference_table(pair_logps(model, heldout), base)
            results.append({"loss": loss, "beta": float(beta), "seed": seed, "losses": found.losses,
                            "seconds": found.seconds, "heldout": table})  # fmt: skip
            (options.out / "results.json").write_text(
                json.dumps({"options": vars(options), "cells": results}, default=str)
            )
            (options.out / "table.md").write_text(markdown(results))
    print(markdown(results))


def markdown(results: list[dict]) -> str:
    """Mean over seeds a row."""
    lines = [
        f"{time.strftime('%Y-%m-%d')}; accuracy of the implicit reward on held-out pairs (the base has 0.5); r =",
        "Pearson correlation of the loss's own margin with the length gap in tokens.",
        "",
        "| loss | β | seeds | last training loss | accuracy, sums | accuracy, means | means, length-matched | r |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss, beta in dict.fromkeys((r["loss"], r["beta"]) for r in results):
        cells = [r for r in results if (r["loss"], r["beta"]) == (loss, beta)]

        def over(value, cells=cells):
            numbers = [value(c) for c in cells]
            if any(n is None for n in numbers):
                return "–"
            spread = f" ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else ""
            return f"{np.mean(numbers):.3f}{spread}"

        def accuracy(group, form):
            return lambda c: c["heldout"][group][form]["accuracy"]["value"] if c["heldout"][group]["n"] else None

        columns = [
            over(lambda c: float(np.mean(c["losses"][-2:]))),
            over(accuracy("all", "implicit_sum")),
            over(accuracy("all", "implicit_mean")),
            over(accuracy("length_matched", "implicit_mean")),
            over(lambda c: c["heldout"]["all"][FORM[c["loss"]]]["length_pearson"]),
        ]
        lines.append(f"| {loss} | {beta:g} | {len(cells)} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
