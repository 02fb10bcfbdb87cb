"""The stages of Shapley values: one SGD run whose steps value their rows, and sets of rows trained on for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from keepset.errors import KeepsetError, RecipeError
from keepset.lazy import pick, take
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops
from keepset.row_ids import id_order
from keepset.runfolder import layout
from keepset.runfolder.files import digest, write_atomic
from keepset.runfolder.shards import Kept
from keepset.stages.stage import VERSION, Stage, Work
from keepset.stages.trained import WarmupCheckpoint, weights_of

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job

MOST_PLAYERS = 64
T = TypeVar("T")


# -- in-run -----------------------------------------------------------------------------------------------------------


def step_values(dots: np.ndarray, lr: float | np.ndarray, curvature: np.ndarray | None) -> np.ndarray:
    """Shapley values of the rows of one SGD step (see `methods/in_run_shapley.py`), in nats of each task's loss.

    `lr` broadcasts with `dots` (..., n, j), <v_j, g_i>; `curvature` is g_iᵀ H_j Σ_{batch} g, None: first order.
    """
    values = np.asarray(lr * dots)
    return values if curvature is None else values - lr**2 / 2 * np.asarray(curvature, np.float64)


@dataclass(frozen=True)
class InRun(Stage):
    """Each row's value for every task, (n, j), in plain SGD over all rows from the warm-up's last checkpoint."""

    second_order: bool
    learning_rate: float
    batch_size: int
    epochs: int
    seed: int
    shots: int | None = None
    unit_norm: bool = False  # values divided by the norm of the row's gradient

    word = "in-run"

    def needs(self, job: Job) -> tuple[Stage, ...]:
        return (WarmupCheckpoint(),)

    def inputs(self, job: Job) -> Any:
        aim = job.aim(self.shots)
        return {**job.data_key(), "ids": job.ids_digest, "tasks": aim.names, "target": aim.target.fingerprint()}

    def _key(self, job: Job) -> dict[str, Any]:
        run = {k: v for k, v in vars(self).items() if k != "shots" and (k, v) != ("unit_norm", False)}
        weights = digest(weights_of(WarmupCheckpoint().value(job).path))
        return {"version": VERSION, **self.inputs(job), "checkpoint": weights, "run": run}

    def batches(self, job: Job) -> list[np.ndarray]:
        """Indices of each step's rows: a new order of the sorted ids every epoch."""
        order, rng = id_order(job.ids), np.random.default_rng(self.seed)
        epochs = [order[rng.permutation(len(order))] for _ in range(self.epochs)]
        return [e[start : start + self.batch_size] for e in epochs for start in range(0, len(e), self.batch_size)]

    def step_cost(self, job: Job, batch: Sequence[Encoded]) -> tuple[int, float]:
        """Tokens and operations of one step: its batch, and the target once or (second order) three times."""
        times = 3 if self.second_order else 1
        own, goal = count_tokens(batch), count_tokens(job.aim(self.shots).chosen)
        work = flops(job.loaded.model, *own, passes=2) + flops(job.loaded.model, *goal, passes=2 * times)
        return own[0] + times * goal[0], work

    def works(self, job: Job) -> tuple[Work, ...]:
        """Every batch, the target's gradients at every step, its loss before and after."""
        aim = job.aim(self.shots)
        batches = [pick(job.rows, batch) for batch in self.batches(job)]
        costs = [self.step_cost(job, batch) for batch in batches]
        goal = count_tokens(aim.chosen)
        tokens = sum(t for t, _ in costs) + 2 * goal[0]
        work = sum(f for _, f in costs) + flops(job.loaded.model, *goal, passes=2)
        stage, titles = f"in-run Shapley{aim.title}, {len(batches)} steps", (f"in-run Shapley{aim.title}",)
        return (Work(stage, "backward", sum(map(len, batches)), tokens, work, (self.id(job),), titles),)

    def value(self, job: Job) -> np.ndarray:
        """(n, j); killed, the run goes on at the next step.

        Raises:
            RecipeError: gradients are of pairs.
        """
        if job.pair_gradients:
            raise RecipeError("in-run-shapley values single rows, not pairs; use rose, less or grad-cosine")
        kept, checkpoint = self.kept(job), WarmupCheckpoint().value(job)

        def work(path: Path) -> dict[str, Any]:
            with attached(job.loaded.model, checkpoint.path) as model:
                return run_steps(job, self, model, path / layout.STATE)

        facts = job.run.step(kept.folder, kept.key, work)
        if not facts["reused"]:
            job.say(
                f"in-run Shapley: {facts['steps']} SGD steps took the target's loss down by {facts['drop']:.4f} nats"
            )
        return load_state(job.run.path / kept.folder / layout.STATE)["values"]

    def kept(self, job: Job) -> Kept:
        """Its folder."""
        key = self._key(job)
        return Kept(layout.in_run(digest(key)[:8]), key, step=True)


def run_steps(job: Job, stage: InRun, model: Any, path: Path) -> dict[str, Any]:
    """Take the steps that are missing, saving values, step and adapter after each."""
    import torch
    from safetensors.numpy import save

    from keepset.features.in_run import in_run_step, task_weights
    from keepset.features.losses import row_losses

    aim, lr = job.aim(stage.shots), stage.learning_rate
    target, weights = aim.chosen, task_weights(aim.pair_codes, len(aim.names))
    budget = job.recipe.batching.token_budget
    adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def target_loss() -> float:
        losses = row_losses(model, target, token_budget=budget)
        spent["tokens"] += count_tokens(target)[0]
        spent["flops"] += flops(job.loaded.model, *count_tokens(target))
        return float((weights.T @ (losses.nll[0] / losses.n_tokens)).mean())

    state = load_state(path) if path.exists() else {}
    if not state:
        state = {"values": np.zeros((len(job.ids), len(aim.names))), "step": np.array(0)}
    with torch.no_grad():
        for n, p in adapter.items():
            if f"adapter.{n}" in state:
                p.copy_(torch.from_numpy(state[f"adapter.{n}"]))
    values, batches = state["values"], stage.batches(job)
    done = int(state["step"])
    with (
        job.run.timed(f"in-run Shapley{aim.title}", rows=len(job.ids), ids=[stage.id(job)]) as spent,
        job.tracked("in-run Shapley", len(batches), "steps") as advance,
    ):
        spent.update(tokens=0, flops=0.0)
        advance(done)
        if "before" not in state:
            state["before"] = np.array(target_loss())
        for number, indices in enumerate(batches[done:], start=done + 1):
            rows = take(job.rows, indices)
            step = in_run_step(
                model, rows, target, weights, learning_rate=lr, second_order=stage.second_order, token_budget=budget
            )
            gained = step_values(np.asarray(step.dots, np.float64), lr, step.curvature)
            values[indices] += gained / step.norms[:, None] if stage.unit_norm else gained
            tokens, work = stage.step_cost(job, rows)
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


def orders(n: int, rounds: int, seed: int) -> Iterator[list[np.ndarray]]:
    """The random orders of n players that Monte-Carlo Shapley walks; antithetic: each with its reverse."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        order = rng.permutation(n)
        yield [order, order[::-1]]


@dataclass(frozen=True)
class Retraining(Stage):
    """A game: the utility of a set of players is minus the target's loss after training on their rows.

    `permutations` only prices it; the sets that were trained on are kept for whoever asks for them again.
    """

    players: str  # row | source | category
    rows_per_player: int
    permutations: int
    seed: int
    shots: int | None = None

    word = "retraining"

    def inputs(self, job: Job) -> Any:
        """The base, the template, the rows, the target and its tasks, and how `train` trains."""
        aim, args = job.aim(self.shots), job.recipe.train
        return {
            **job.data_key(), "tasks": aim.names, "target": aim.target.fingerprint(),
            "lora": job.recipe.lora.model_dump(),
            "args": [args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size],
        }  # fmt: skip

    def members(self, job: Job) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each player's rows (indices), and those of them that stand for it in a training.

        Raises:
            RecipeError: more players than can be trained for.
        """
        if self.players == "row":
            members = [np.array([i]) for i in range(len(job.ids))]
        else:
            table = job.pool.table.column(self.players).to_pylist()
            labels = np.array([str(table[i]) for i in job.usable])
            members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if not 2 <= len(members) <= MOST_PLAYERS:
            raise RecipeError(
                f"tmc-shapley: {len(members)} players ({self.players}); it trains a model for every prefix of "
                f"{self.permutations} orders, here up to {self.permutations * len(members)} models, and takes 2 to "
                f"{MOST_PLAYERS}; use `players: source` (or category), a smaller pool, or in-run-shapley"
            )
        rng = np.random.default_rng(self.seed)
        return [
            (m, m if len(m) <= self.rows_per_player
             else rng.choice(m[id_order(job.ids[m])], self.rows_per_player, replace=False))
            for m in members
        ]  # fmt: skip

    def key(self, job: Job, members: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Everything that the utilities depend on."""
        return {
            "version": VERSION, **self.inputs(job), "seed": self.seed,
            "players": [[str(i) for i in sorted(job.ids[rows])] for _, rows in members],
        }  # fmt: skip

    def sets(self, n: int) -> set[frozenset[int]]:
        """The sets of players that are trained on without truncation, each once."""
        seen = {frozenset[int](), frozenset(range(n))}
        for walks in orders(n, self.permutations // 2, self.seed):
            seen |= {frozenset(walk[:place].tolist()) for walk in walks for place in range(1, n)}
        return seen

    def cost(self, job: Job, rows: Sequence[Encoded]) -> tuple[int, float]:
        """Tokens and operations of training on some rows and scoring the target."""
        epochs = job.recipe.train.num_train_epochs
        own, goal = count_tokens(rows), count_tokens(job.aim(self.shots).chosen)
        work = flops(job.loaded.model, *own, passes=2) * epochs + flops(job.loaded.model, *goal)
        return int(own[0] * epochs) + goal[0], work

    def works(self, job: Job) -> tuple[Work, ...]:
        """The trainings, each set of players once, none cut short by a tolerance."""
        members, aim = self.members(job), job.aim(self.shots)
        ids, titles = (digest(self.key(job, members))[:16],), (f"retraining (Shapley{aim.title})",)
        works = []
        for players in sorted(self.sets(len(members)), key=sorted):
            rows = pick(job.rows, np.concatenate([np.zeros(0, int), *(members[p][1] for p in sorted(players))]))
            tokens, work = self.cost(job, rows)
            stage, part = f"train models (Shapley{aim.title})", " ".join(map(str, sorted(players)))
            works.append(
                Work(stage, "train", len(rows), tokens, work, ids, titles, trainings=1, part=part, counted=True)
            )
        return tuple(works)

    def value(self, job: Job) -> Game:
        """The game.

        Raises:
            RecipeError: gradients are of pairs.
        """
        if job.pair_gradients:
            raise RecipeError("tmc-shapley trains on single rows, not on pairs; use rose, less or grad-cosine")
        return Game(job, self)


class Game:
    """Players and the utility of a set of them, each set trained on once and written down at once."""

    def __init__(self, job: Job, stage: Retraining) -> None:
        """Nothing is trained before `play`."""
        self.job, self.stage, self.aim = job, stage, job.aim(stage.shots)
        self.members = stage.members(job)
        self.key = digest(stage.key(job, self.members))[:16]
        self.name = layout.retraining(self.key)

    @cached_property
    def utilities(self) -> dict[str, float]:
        """Utilities of the sets that were trained on before; none where the file is damaged."""
        try:
            stored = self.job.run.load_json(self.name, {})
        except KeepsetError:
            return {}
        if not isinstance(stored, dict):
            return {}
        return {k: float("nan" if v is None else v) for k, v in stored.items()}

    def play(self, walk: Callable[[int, Callable[[np.ndarray], float]], T]) -> T:
        """Call `walk` with the number of players and the utility of a set of them (indices, in any order)."""
        from keepset.features.retraining import Retraining as Trainings
        from keepset.model.load import apply_lora

        job, args = self.job, self.job.recipe.train
        model = apply_lora(job.loaded.model, job.recipe.lora, self.stage.seed)
        try:
            train = Trainings(
                model, job.rows, self.aim.chosen, self.aim.pair_codes, learning_rate=args.learning_rate,
                epochs=args.num_train_epochs, batch_size=args.per_device_train_batch_size,
                token_budget=job.recipe.batching.token_budget, seed=self.stage.seed,
            )  # fmt: skip
            title = f"retraining (Shapley{self.aim.title})"
            with (
                job.run.timed(title, rows=len(job.ids), ids=[self.key]) as spent,
                job.tracked("retraining", len(self.stage.sets(len(self.members))), "models") as advance,
            ):
                spent.update(tokens=0, flops=0.0)
                advance(len(self.utilities))
                result = walk(len(self.members), self._utility(train, spent, advance))
                spent["skip"] = spent["tokens"] == 0
        finally:
            model.unload()
        return result

    def _utility(
        self, train: Callable[[np.ndarray], float], spent: dict[str, Any], advance: Callable[[int], None]
    ) -> Callable[[np.ndarray], float]:
        job, utilities = self.job, self.utilities

        def utility(players: np.ndarray) -> float:
            label = " ".join(str(i) for i in sorted(players.tolist()))
            if label not in utilities:
                rows = np.concatenate([np.zeros(0, np.int64), *(self.members[i][1] for i in players)])
                rows = rows[id_order(job.ids[rows])]
                utilities[label] = train(rows)
                job.run.save_json(self.name, utilities)
                tokens, work = self.stage.cost(job, pick(job.rows, rows))
                spent["tokens"] += tokens
                spent["flops"] += work
                advance(1)
            return utilities[label]

        return utility

    def of_rows(self, of_players: np.ndarray) -> np.ndarray:
        """A number of each player, split evenly over its rows (n,)."""
        values = np.zeros(len(self.job.ids))
        for (rows, _), value in zip(self.members, of_players, strict=True):
            values[rows] = value / len(rows)
        return values
