"""Metagradient against leaving each row out of a real training, and halves of the rows: SmolLM2 on the demo's rows.

`python experiments/metagradient/leave_one_out.py --out results.json`. A row is left out by its weight 0: same start,
order and denominators. Every run is the replay of the trainer's, which tests hold against the trainer.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from keepset.features.metagradient import Adjoint, Objective, Replay, reference_logps
from keepset.recipe import load_recipe
from keepset.stages.job import Job
from keepset.train.rehearsal import rehearse
from keepset.train.training import Training

LOSSES = ("dpo", "sft")
LONGEST = 56  # tokens of a row


def opened(args: argparse.Namespace, folder: str) -> tuple[Replay, list[Objective]]:
    """The replay of a training on some rows of the demo's pool, and the target's losses."""
    demo = load_recipe(Path(str(importlib.resources.files("keepset") / "demo" / "recipe.yaml")))
    job = Job(demo.model_copy(update={"run_dir": folder}))
    short = [i for i, row in enumerate(job.rows) if len(row.input_ids) <= LONGEST]
    drawn = np.random.default_rng(args.seed).choice(short, args.rows, replace=False)
    sides = [(job.rows[i],) for i in sorted(drawn, key=lambda i: str(job.ids[i]))]
    pairs: list[Any] = job.aim(args.shots).pairs
    spec = demo.train.model_copy(update={"num_train_epochs": args.epochs, "extra": {"adam_epsilon": args.epsilon}})
    course, model = rehearse(Training(demo.model, demo.lora, spec, args.seed), sides, job.loaded.model,
                             job.encoder.tokenizer)  # fmt: skip
    reference = reference_logps(model, pairs, token_budget=1024)
    tokens = sum(len(row.input_ids) for (row,) in sides)
    print(f"{len(sides)} rows, {tokens} tokens, {len(course.batches)} steps, {len(pairs)} pairs", flush=True)
    return Replay(model, Objective(sides, "tokens"), course), [Objective(pairs, n, 0.1, reference) for n in LOSSES]


def trained(replay: Replay, goals: list[Objective], start: Any, weights: np.ndarray) -> np.ndarray:
    """(losses,) after the training with these weights."""
    state = start
    for t in range(len(replay.course.batches)):
        state, _ = replay.forward(state, t, weights)
    replay.put(state.theta)
    with torch.no_grad():
        every = np.arange(len(goals[0].examples))
        return np.array([float(goal.losses(replay.model, every).double().mean()) for goal in goals])


def derivatives(replay: Replay, goals: list[Objective], start: Any) -> np.ndarray:
    """(n, losses) by the adjoint, all losses at once."""
    state, taken = replay.run(start, 0, len(replay.course.batches))
    even = np.full((len(goals[0].examples), 1), 1 / len(goals[0].examples))
    gradients = [replay.gradient_of(goal, state, even)[1] for goal in goals]
    adjoint = Adjoint.of({n: torch.cat([g[n] for g in gradients]) for n in replay.names})
    values = np.zeros((len(replay.objective.examples), len(goals)))
    for t in reversed(range(len(taken))):
        adjoint, slopes = replay.back(taken.pop(), t, adjoint)
        values[replay.course.batches[t]] += slopes
    return values


def compared(predicted: np.ndarray, real: np.ndarray) -> dict[str, dict[str, float]]:
    """Correlations of predicted and real changes (runs, losses), and the slope of real on predicted."""
    table = {}
    for k, name in enumerate(LOSSES):
        x, y = predicted[:, k], real[:, k]
        table[name] = {
            "pearson": float(pearsonr(x, y)[0]), "spearman": float(spearmanr(x, y)[0]), "slope": float(x @ y / (x @ x)),
            "largest_change": float(np.abs(y).max()),
        }  # fmt: skip
        print(f"  {name:12s}" + "  ".join(f"{key} {value:.4f}" for key, value in table[name].items()), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--epsilon", type=float, default=1e-8, help="Adam's")
    parser.add_argument("--shots", type=int, default=2, help="pairs a task of the target")
    parser.add_argument("--halves", type=int, default=8, help="random halves of the rows trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        replay, goals = opened(args, folder)
    n, start, clock = args.rows, replay.start(), time.process_time
    before = clock()
    whole = trained(replay, goals, start, np.ones(n))
    training = clock() - before
    before = clock()
    slopes = derivatives(replay, goals, start)
    adjoint = clock() - before
    print(f"CPU s: one training {training:.0f}, replay and adjoint of {len(LOSSES)} losses {adjoint:.0f}", flush=True)
    rng = np.random.default_rng(args.seed + 1)
    runs = {
        "leave one out": [np.arange(n) != i for i in range(n)],
        "random halves": [np.isin(np.arange(n), rng.choice(n, n // 2, replace=False)) for _ in range(args.halves)],
    }
    out: dict[str, Any] = {"arguments": {k: v for k, v in vars(args).items() if k != "out"}}
    out |= {"training_cpu_s": training, "adjoint_cpu_s": adjoint, "whole": whole.tolist()}
    for name, kept in runs.items():
        real = np.array([trained(replay, goals, start, w.astype(float)) - whole for w in kept])
        predicted = np.array([-slopes[~w].sum(axis=0) for w in kept])
        print(f"{name}, {len(kept)} trainings", flush=True)
        out[name] = {
            **compared(predicted, real),
            "predicted": predicted.tolist(),
            "real": real.tolist(),
            "cpu_s": clock(),
        }
        args.out.write_text(json.dumps(out, indent=1) + "\n")
    print(f"{clock():.0f} CPU s in all")


if __name__ == "__main__":
    main()
