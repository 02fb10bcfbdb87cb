"""DPO, IPO and DavIR-DPO on the same pairs: held-out accuracy, and how far each loss's margin follows the length gap.

python experiments/dpo-losses/run.py --pairs PAIRS.jsonl --out DIR [--train 40 --heldout 48 --seeds 0 1 2]

Pairs are any file keepset reads as a target. A seed draws the training pairs, the adapter and the order; the held-out
pairs are the same for all. Reference log-probabilities are computed once a seed. Every cell (loss, β, seed) is trained
once and kept in DIR: a run that broke goes on where it stopped. The table is printed and written to DIR/table.md, the
numbers to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from keepset.data import load_target
from keepset.evaluate.preference import length_matched, pair_logps, preference_table
from keepset.model.adapters import attached
from keepset.model.encode import RowRefused
from keepset.model.load import load
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.preference import PairLoss, train_dpo
from keepset.train.training import Training

# What each loss pushes up, and so what its own margin is.
FORM = {"dpo": "implicit_sum", "ipo": "implicit_mean", "dpo_mean": "implicit_mean", "davir": "implicit_relative"}
CELLS = ["dpo:0.1", "ipo:0.1", "davir:0.1", "davir:1", "davir:5", "davir:20", "davir:100"]


def read_pairs(path: str, loaded, longest: int) -> tuple[list, list[str]]:
    """Every pair of at most `longest` tokens, both sides counted, in the order of their ids, and its prompt."""
    target = load_target(path)
    pairs, prompts = [], []
    for i in np.argsort(target.ids, kind="stable"):
        prompt, chosen, rejected = target.pair(int(i))
        try:
            pair = tuple(loaded.encoder.encode_pair(prompt, side) for side in (chosen, rejected))
        except RowRefused:
            continue
        if sum(len(one.input_ids) for one in pair) <= longest:
            pairs.append(pair)
            prompts.append(json.dumps(prompt))
    return pairs, prompts


def draw(pairs: list, prompts: list[str], n_heldout: int) -> tuple[list, list]:
    """Held-out pairs, half of them of like length, one a prompt; and all pairs of the other prompts."""
    order = np.random.default_rng(0).permutation(len(pairs))
    like = length_matched(*np.array([[int(one.supervised.sum()) for one in pair] for pair in pairs]).T)
    heldout: dict[str, int] = {}
    for group in (like, ~like):
        fresh = [i for i in order if group[i] and prompts[i] not in heldout]
        heldout |= {prompts[i]: i for i in fresh[: n_heldout // 2]}
    return [pairs[i] for i in heldout.values()], [pairs[i] for i in order if prompts[i] not in heldout]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=48)
    parser.add_argument("--longest", type=int, default=150, help="tokens of a pair, both sides")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec(model_name_or_path=options.model, max_length=options.longest)
    loaded, console = load(spec), Console(stderr=True)
    heldout, rest = draw(*read_pairs(options.pairs, loaded, options.longest), options.heldout)
    tokens = sum(len(one.input_ids) for pair in rest for one in pair) / len(rest)
    console.print(f"{len(rest)} pairs to draw from, {tokens:.0f} tokens each; {len(heldout)} held out")
    base = pair_logps(loaded.model, heldout)
    args = TrainSpec(
        num_train_epochs=options.epochs, learning_rate=options.learning_rate, per_device_train_batch_size=4
    )
    results = []
    for seed in options.seeds:
        drawn = np.random.default_rng(seed).choice(len(rest), options.train, replace=False)
        train = [rest[i] for i in drawn]
        reference = pair_logps(loaded.model, train)
        for cell in options.cells:
            loss, beta = cell.split(":")
            out = options.out / f"{loss}-{beta}-seed{seed}"
            if not (out / "cell.json").exists():
                training = Training(spec, LoraSpec(), args, seed, console=console)
                found = train_dpo(training, train, out, PairLoss.of(loss, float(beta)), reference=reference)
                with attached(loaded.model, out) as model:
                    table = preference_table(pair_logps(model, heldout), base)
                facts = {"loss": loss, "beta": float(beta), "seed": seed, "losses": found.losses,
                         "seconds": found.seconds, "heldout": table}  # fmt: skip
                (out / "cell.json").write_text(json.dumps(facts))
            results.append(json.loads((out / "cell.json").read_text()))
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
