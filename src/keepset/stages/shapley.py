"""The stages of Shapley values: one SGD run whose steps value their rows, and sets of rows trained on for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import KeepsetError, RecipeError
from keepset.methods.in_run_shapley import in_run_shapley
from keepset.methods.tmc_shapley import ShapleyEstimate, tmc_shapley
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops
from keepset.runfolder import layout
from keepset.runfolder.files import digest, write_atomic
from keepset.stages.counts import pair_gradients
from keepset.stages.losses import VERSION, id_order, warmup_checkpoints, weights_of

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job

MOST_PLAYERS = 64


# -- in-run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InRun:
    """The run that values its rows: plain SGD from the warm-up's last checkpoint, every row in one batch an epoch."""

    second_order: bool
    learning_rate: float
    batch_size: int
    epochs: int
    seed: int


def in_run_batches(ids: np.ndarray, spec: InRun) -> list[np.ndarray]:
    """Indices of each step's rows: a new order of the sorted ids every epoch."""
    order, rng = id_order(ids), np.random.default_rng(spec.seed)
    epochs = [order[rng.permutation(len(order))] for _ in range(spec.epochs)]
    return [e[start : start + spec.batch_size] for e in epochs for start in range(0, len(e), spec.batch_size)]


def in_run_cost(job: Job, batch: list[Encoded], second_order: bool) -> tuple[int, float]:
    """Tokens and operations of one step: its batch, and the target once or (second order) three times."""
    target = [chosen for chosen, _ in job.target_pairs[0]]
    times = 3 if second_order else 1
    own, goal = count_tokens(batch), count_tokens(target)
    work = flops(job.loaded.model, *own, passes=2) + flops(job.loaded.model, *goal, passes=2 * times)
    return own[0] + times * goal[0], work


def in_run_values(job: Job, spec: InRun) -> np.ndarray:
    """Value of every row for every task, (n, j), in nats of the task's loss; killed, it goes on at the next step."""
    if pair_gradients(job):
        raise RecipeError("in-run-shapley values single rows, not pairs; use rose, less or grad-cosine")
    checkpoint = warmup_checkpoints(job)[-1]
    names, codes = job.task_codes()
    key = {
        "version": VERSION, **job.data_key(), "ids": digest([str(i) for i in job.ids]), "tasks": names,
        "target": job.target.fingerprint(), "checkpoint": digest(weights_of(checkpoint.path)), "run": vars(spec),
    }  # fmt: skip
    folder = layout.in_run(digest(key)[:8])

    def work(path: Path) -> dict[str, Any]:
        with attached(job.loaded.model, checkpoint.path) as model:
            return run_steps(job, spec, model, path / layout.STATE)

    facts = job.run.step(folder, key, work)
    if not facts["reused"]:
        job.say(f"in-run Shapley: {facts['steps']} SGD steps took the target's loss down by {facts['drop']:.4f} nats")
    return load_state(job.run.path / folder / layout.STATE)["values"]


def run_steps(job: Job, spec: InRun, model: Any, path: Path) -> dict[str, Any]:
    """Take the steps that are missing, saving values, step and adapter after each."""
    import torch
    from safetensors.numpy import save

    from keepset.features.in_run import in_run_step, task_weights
    from keepset.features.losses import row_losses

    names, codes = job.task_codes()
    pairs, kept = job.target_pairs
    target, weights = [chosen for chosen, _ in pairs], task_weights(codes[kept], len(names))
    budget = job.recipe.batching.token_budget
    adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def target_loss() -> float:
        found = row_losses(model, target, token_budget=budget)
        spent["tokens"] += count_tokens(target)[0]
        spent["flops"] += flops(job.loaded.model, *count_tokens(target))
        return float((weights.T @ (found.nll[0] / found.n_tokens)).mean())

    state = load_state(path) if path.exists() else {}
    if not state:
        state = {"values": np.zeros((len(job.ids), len(names))), "step": np.array(0)}
    with torch.no_grad():
        for n, p in adapter.items():
            if f"adapter.{n}" in state:
                p.copy_(torch.from_numpy(state[f"adapter.{n}"]))
    values, batches = state["values"], in_run_batches(job.ids, spec)
    done = int(state["step"])
    with (
        job.run.timed(f"in-run Shapley{job.aim}", rows=len(job.ids)) as spent,
        job.tracked("in-run Shapley", len(batches), "steps") as advance,
    ):
        spent.update(tokens=0, flops=0.0)
        advance(done)
        if "before" not in state:
            state["before"] = np.array(target_loss())
        for number, indices in enumerate(batches[done:], start=done + 1):
            rows = [job.rows[i] for i in indices]
            step = in_run_step(
                model, rows, target, weights, learning_rate=spec.learning_rate, second_order=spec.second_order,
                token_budget=budget,
            )  # fmt: skip
            curvature = None if step.curvature is None else step.curvature[None]
            everyone = np.ones((1, len(rows)), dtype=bool)
            values[indices] += in_run_shapley(step.dots[None], np.array([spec.learning_rate]), everyone, curvature)[1]
            tokens, work = in_run_cost(job, rows, spec.second_order)
            spent["tokens"] += tokens
            spent["flops"] += work
            tensors = {f"adapter.{n}": p.detach().cpu().numpy() for n, p in adapter.items()}
            write_atomic(path, save({**tensors, **state, "values": values, "step": np.array(number)}))
            advance(1)
        return {"steps": len(batches), "drop": float(state["before"]) - target_loss()}


def load_state(path: Path) -> dict[str, np.ndarray]:
    """A run's state; nothing of it where the file is torn."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return {}


# -- sets trained on for real -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrain:
    """Who plays, and how often."""

    players: str  # row | source | category
    rows_per_player: int
    permutations: int
    tolerance: float
    seed: int


def players_of(job: Job, spec: Retrain) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each player's rows (indices), and those of them that stand for it in a training.

    Raises:
        RecipeError: more players than can be trained for.
    """
    if spec.players == "row":
        members = [np.array([i]) for i in range(len(job.ids))]
    else:
        table = job.pool.table.column(spec.players).to_pylist()
        labels = np.array([str(table[i]) for i in job.usable])
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if not 2 <= len(members) <= MOST_PLAYERS:
        raise RecipeError(
            f"tmc-shapley: {len(members)} players ({spec.players}); it trains a model for every prefix of "
            f"{spec.permutations} orders, here up to {spec.permutations * len(members)} models, and takes 2 to "
            f"{MOST_PLAYERS}; use `players: source` (or category), a smaller pool, or in-run-shapley"
        )
    rng = np.random.default_rng(spec.seed)
    return [
        (m, m if len(m) <= spec.rows_per_player
         else rng.choice(m[id_order(job.ids[m])], spec.rows_per_player, replace=False))
        for m in members
    ]  # fmt: skip


def retraining_sets(n: int, spec: Retrain) -> set[frozenset[int]]:
    """The sets of players that are trained on without truncation, each once."""
    seen: set[frozenset[int]] = set()

    def note(players: np.ndarray) -> float:
        seen.add(frozenset(players.tolist()))
        return 0.0

    tmc_shapley(n, note, permutations=spec.permutations, seed=spec.seed)
    return seen


def retraining_cost(job: Job, rows: list[Encoded]) -> tuple[int, float]:
    """Tokens and operations of training on some rows and scoring the target."""
    target, epochs = [chosen for chosen, _ in job.target_pairs[0]], job.recipe.train.num_train_epochs
    own, goal = count_tokens(rows), count_tokens(target)
    work = flops(job.loaded.model, *own, passes=2) * epochs + flops(job.loaded.model, *goal)
    return int(own[0] * epochs) + goal[0], work


def retraining_values(job: Job, spec: Retrain) -> tuple[np.ndarray, np.ndarray, ShapleyEstimate]:
    """Shapley value of each row's player, split evenly over its rows (n,); its standard error (n,); the estimate."""
    from keepset.features.retraining import Retraining
    from keepset.model.load import apply_lora

    if pair_gradients(job):
        raise RecipeError("tmc-shapley trains on single rows, not on pairs; use rose, less or grad-cosine")
    players = players_of(job, spec)
    names, codes = job.task_codes()
    pairs, kept = job.target_pairs
    args = job.recipe.train
    key = {
        "version": VERSION, **job.data_key(), "tasks": names, "target": job.target.fingerprint(),
        "players": [[str(i) for i in sorted(job.ids[rows])] for _, rows in players],
        "seed": spec.seed, **retraining_args(job),
    }  # fmt: skip
    name = layout.retraining(digest(key)[:16])
    known: dict[str, float] = known_utilities(job, name)
    model = apply_lora(job.loaded.model, job.recipe.lora, spec.seed)
    try:
        train = Retraining(
            model, job.rows, [chosen for chosen, _ in pairs], codes[kept], learning_rate=args.learning_rate,
            epochs=args.num_train_epochs, batch_size=args.per_device_train_batch_size,
            token_budget=job.recipe.batching.token_budget, seed=spec.seed,
        )  # fmt: skip
        expected = len(retraining_sets(len(players), spec))
        with (
            job.run.timed(f"retraining (Shapley{job.aim})", rows=len(job.ids)) as spent,
            job.tracked("retraining", expected, "models") as advance,
        ):
            spent.update(tokens=0, flops=0.0)
            advance(len(known))
            utility = remembered(job, name, known, players, train, spent, advance)
            estimate = tmc_shapley(
                len(players), utility, permutations=spec.permutations, tolerance=spec.tolerance, seed=spec.seed
            )
            spent["skip"] = spent["tokens"] == 0
    finally:
        model.unload()
    value, error = np.zeros(len(job.ids)), np.zeros(len(job.ids))
    for (rows, _), v, e in zip(players, estimate.values, estimate.standard_errors, strict=True):
        value[rows], error[rows] = v / len(rows), e / len(rows)
    return value, error, estimate


def retraining_args(job: Job) -> dict[str, Any]:
    """What of the recipe those trainings follow."""
    args = job.recipe.train
    return {
        "lora": job.recipe.lora.model_dump(),
        "args": [args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size],
    }


def known_utilities(job: Job, name: str) -> dict[str, float]:
    """Utilities of the sets that were trained on before; none where the file is damaged."""
    try:
        found = job.run.load_json(name, {})
    except KeepsetError:
        return {}
    return {k: float("nan" if v is None else v) for k, v in found.items()} if isinstance(found, dict) else {}


def remembered(
    job: Job, name: str, known: dict[str, float], players: list[tuple[np.ndarray, np.ndarray]],
    train: Callable[[np.ndarray], float], spent: dict[str, Any], advance: Callable[[int], None],
) -> Callable[[np.ndarray], float]:  # fmt: skip
    """The utility of sets of players, each trained on once and written down at once."""

    def utility(some: np.ndarray) -> float:
        label = " ".join(str(i) for i in sorted(some.tolist()))
        if label not in known:
            rows = np.concatenate([np.zeros(0, np.int64), *(players[i][1] for i in some)])
            rows = rows[id_order(job.ids[rows])]
            known[label] = train(rows)
            job.run.save_json(name, known)
            tokens, work = retraining_cost(job, [job.rows[i] for i in rows])
            spent["tokens"] += tokens
            spent["flops"] += work
            advance(1)
        return known[label]

    return utility
