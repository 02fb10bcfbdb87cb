"""∇²L u of one batch on SmolLM2: differentiating twice, and central differences of the engine's gradients.

`python experiments/metagradient/second_derivative.py`. u is what Adam makes of a target's gradient after three steps.
Errors against float64 on a tiny model: `tests/features/test_metagradient.py`.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import keepset
from keepset.features.influence import influence
from keepset.features.metagradient import Adjoint, Objective, Replay, curvature, undo_adamw
from keepset.features.row_gradients import weighted_gradients
from keepset.features.targets import GradientTarget
from keepset.recipe import load_recipe
from keepset.stages.job import Job
from keepset.train.rehearsal import rehearse
from keepset.train.training import Training

BUDGET = 512


def peak() -> float:
    """GiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    torch.set_num_threads(1)
    demo = load_recipe(Path(str(keepset.__file__)).parent / "demo/recipe.yaml")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(demo.model_copy(update={"run_dir": folder}))
        rows, aim = job.rows[:16], job.aim(2).chosen
        args = demo.train.model_copy(update={"num_train_epochs": 1, "warmup_ratio": 0.0})
        course, model = rehearse(
            Training(demo.model, demo.lora, args), [(r,) for r in rows], job.loaded.model, job.encoder.tokenizer
        )
        replay = Replay(model, Objective([(r,) for r in rows], "tokens"), course)
        state, taken = replay.run(replay.start(), 0, 3)
        goal = Objective([(r,) for r in aim], "sft")
        _, gradient = replay.gradient_of(goal, state, np.full((len(aim), 1), 1 / len(aim)))
        _, exact = undo_adamw(course, taken[-1], 2, Adjoint.of(gradient))
        u = {n: x.float() for n, x in exact.items()}
        replay.put(state.theta)
        batch = course.batches[3]
        own = [rows[i] for i in batch]
        mass = replay.objective.mass(batch)
        print(f"{len(batch)} rows, {sum(len(r.input_ids) for r in own)} tokens; peak before: {peak():.1f} GiB")

        clock = time.process_time()
        target = GradientTarget(u, np.zeros(1, int), np.zeros(1), np.zeros(1), np.ones(1))
        for p in model.parameters():
            p.requires_grad_(False)
        dots = influence(model, own, target, map="sgd", token_budget=BUDGET).dots[:, 0]
        print(f"the rows' dots by the engine: {time.process_time() - clock:.1f} CPU s")
        weights = (mass / mass.sum())[:, None]
        size, length = (torch.stack([x.norm() for x in part.values()]).norm() for part in (state.theta, u))
        differences = {}
        for reach in (2e-3, 5e-3, 1e-2):
            clock, step, sides = time.process_time(), reach * size / length, []
            for sign in (1, -1):
                replay.put({n: x + sign * step * u[n][0] for n, x in state.theta.items()})
                sides.append(weighted_gradients(model, own, weights, token_budget=BUDGET))
            differences[reach] = torch.cat([((sides[0][n] - sides[1][n]) / (2 * step)).flatten() for n in u])
            print(f"central differences, step {reach:g} of |theta|: {time.process_time() - clock:.1f} CPU s")
        print(f"peak: {peak():.1f} GiB")
        replay = Replay(model, replay.objective, course)
        replay.put(state.theta)
        for attempt in ("first", "again"):
            clock = time.process_time()
            slopes, products = curvature(model, replay.objective, batch, u, BUDGET)
            print(f"differentiating twice, {attempt}: {time.process_time() - clock:.1f} CPU s")
        print(f"peak: {peak():.1f} GiB")
        twice = torch.cat([x.flatten() for x in products.values()])
        for reach, found in differences.items():
            print(f"difference of the two, step {reach:g}: {float((found - twice).norm() / twice.norm()):.1e}")
        want = mass / mass.sum() * dots  # a batch keeps its divisor, whatever its rows weigh
        off = np.abs(slopes[:, 0] - want).max() / np.abs(want).max()
        print(f"the rows' derivatives, engine against autograd: {off:.1e}")


if __name__ == "__main__":
    main()
