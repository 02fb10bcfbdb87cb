"""The stage of `metagradient`: the recipe's training over the whole pool, replayed forwards and then backwards.

The trainer is rehearsed, so that order, schedule and start are its own. Forwards, every k-th state goes to disk;
backwards, the steps from a stored state are taken again and undone one by one, the adjoint written down after each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import DataError, RecipeError
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.row_ids import id_order
from keepset.runfolder import layout
from keepset.runfolder.files import digest, write_atomic
from keepset.stages.shapley import load_state
from keepset.stages.stage import VERSION, Stage, Work

if TYPE_CHECKING:
    from keepset.features.metagradient import Objective, Replay, State, Tensors
    from keepset.stages.job import Job

SEGMENT = 1 << 31
"""Most bytes of steps held at once; one step always is."""


def segment(steps: int, numbers: int) -> int:
    """Steps from one stored state to the next, k: about √steps, fewer where 16 bytes × numbers × k pass `SEGMENT`."""
    return max(1, min(math.ceil(math.sqrt(steps)), SEGMENT // (16 * numbers)))


@dataclass(frozen=True)
class Metagradient(Stage):
    """∂J/∂w of every row, (n, j): J is the target's loss after `train` over the whole pool, j its tasks (or 1)."""

    loss: str  # sft | dpo | margin | mean_margin
    beta: float
    apart: bool  # a derivative for each task; else of their mean
    seed: int
    shots: int | None = None

    word = "replay"

    def inputs(self, job: Job) -> Any:
        """The base, the template, the rows, the target and its tasks, and how `train` trains."""
        aim, args = job.aim(self.shots), job.recipe.train
        return {
            **job.data_key(), "ids": job.ids_digest, "tasks": aim.names, "target": aim.target.fingerprint(),
            "lora": job.recipe.lora.model_dump(), "args": args.key(),
        }  # fmt: skip

    def _columns(self, job: Job) -> int:
        return len(job.aim(self.shots).names) if self.apart else 1

    def works(self, job: Job) -> tuple[Work, ...]:
        """Two trainings forwards, and backwards 2 + 2j forward passes; the target's gradients and references."""
        args, aim, j = job.recipe.train, job.aim(self.shots), self._columns(job)
        rows = trained_sides(job.sides[1], args)
        goals = [side for pair in self.targets(job) for side in pair]
        own, goal, model = count_tokens(rows), count_tokens(goals), job.loaded.model
        extra = float(args.loss != "sft")  # the reference of pairs
        work = flops(model, *own, passes=(2 + 2 + 2 + 2 * j) * args.num_train_epochs + extra)
        again = float(self.loss == "dpo")
        work += flops(model, *goal, passes=1 + j + again)
        tokens = int(own[0] * (3 * args.num_train_epochs + extra) + goal[0] * (1 + again))
        title = f"metagradient ({self.loss}{aim.title})"
        return (Work(title, "train", len(job.ids), tokens, work, (self.id(job),), (title,)),)

    def targets(self, job: Job) -> list[tuple[Any, ...]]:
        """The target's rows as the sides that the loss looks at.

        Raises:
            RecipeError: a loss of pairs, and the target has no rejected sides.
        """
        pairs = job.aim(self.shots).pairs
        if self.loss == "sft":
            return [pair[:1] for pair in pairs]
        if any(rejected is None for _, rejected in pairs):
            raise RecipeError(
                f"metagradient: loss: {self.loss} needs pairs and the target has no `rejected`; use loss: sft"
            )
        return list(pairs)

    def value(self, job: Job) -> np.ndarray:
        """(n, j); killed, the run goes on at the stored state, or the step backwards, that it had come to.

        Raises:
            RecipeError: a training that can't be followed (see `rehearse`), or a target that doesn't fit the loss.
        """
        key = {"version": VERSION, **self.inputs(job), "run": {k: v for k, v in vars(self).items() if k != "shots"}}
        folder = layout.metagradient(digest(key)[:8])
        self.targets(job)
        facts = job.run.step(folder, key, lambda path: self._work(job, path))
        if not facts["reused"]:
            job.say(f"metagradient: after {facts['steps']} steps the target's {self.loss} loss is {facts['loss']:.4f}")
        return load_state(job.run.path / folder / layout.STATE)["values"]

    def _work(self, job: Job, path: Path) -> dict[str, Any]:
        """Replay, and leave the values in the folder."""
        (price,) = self.works(job)
        try:
            with job.run.timed(price.stage, rows=price.rows, ids=list(price.ids)) as spent:
                replay, goal, weights, order = self._opened(job)
                stored = StoredReplay(replay, path, job)
                stored.forwards()
                losses = stored.backwards(goal, weights, order)
                spent.update(tokens=price.tokens, flops=price.flops)
        finally:
            job.release()  # the trainer's adapter is on it
        if not np.isfinite(losses).all():
            raise DataError("metagradient: the loss became NaN or infinite in training; lower train.learning_rate")
        for file in path.glob(f"{KEPT}*"):
            file.unlink()
        return {"steps": stored.steps, "loss": float(losses.mean())}

    def _opened(self, job: Job) -> tuple[Replay, Objective, np.ndarray, np.ndarray]:
        """The replay, the target's loss with its rows' weights (m, j), and the order of the pool's rows in training."""
        from keepset.features.in_run import task_weights
        from keepset.features.metagradient import Objective, Replay, reference_logps
        from keepset.model.pair_losses import pair_beta
        from keepset.train.rehearsal import rehearse
        from keepset.train.training import Training

        args, budget, aim = job.recipe.train, job.recipe.batching.token_budget, job.aim(self.shots)
        order = id_order(job.ids)
        sides: list[Any] = [job.sides[1][i][: 1 if args.loss == "sft" else 2] for i in order]
        training = Training(job.recipe.model, job.recipe.lora, args, self.seed)
        course, model = rehearse(training, sides, job.loaded.model, job.encoder.tokenizer)
        targets = self.targets(job)
        references = [
            reference_logps(model, pairs, token_budget=budget) if needed else None
            for pairs, needed in ((sides, args.loss != "sft"), (targets, self.loss == "dpo"))
        ]
        loss = "tokens" if args.loss == "sft" else args.loss
        beta = 0.0 if args.loss == "sft" else pair_beta(args.loss, args.beta)
        replay = Replay(model, Objective(sides, loss, beta, references[0]), course, token_budget=budget)
        weights = task_weights(aim.pair_codes, len(aim.names))
        weights = weights if self.apart else weights.mean(axis=1, keepdims=True)
        return replay, Objective(targets, self.loss, self.beta, references[1]), weights, order


KEPT = "step-"
"""What the files of stored states begin with."""


class StoredReplay:
    """A replay through a folder: forwards with states left behind, backwards with the adjoint written down."""

    def __init__(self, replay: Replay, path: Path, job: Job) -> None:
        """Nothing is computed yet; what it takes is said."""
        self.replay, self.path, self.job = replay, path, job
        self.steps = len(replay.course.batches)
        numbers = sum(replay.model.get_parameter(n).numel() for n in replay.names)
        self.every = segment(self.steps, numbers)
        self.marks = range(0, self.steps, self.every)
        memory, disk = 16 * numbers * self.every / 2**20, 12 * numbers * len(self.marks) / 2**20
        job.say(f"metagradient: {self.steps} steps, a state stored every {self.every}: {memory:.0f} MiB of memory for "
                f"steps, {disk:.0f} MiB on disk while it runs")  # fmt: skip

    def forwards(self) -> None:
        """Take the steps up to the last mark, storing the state at every mark."""
        if load_state(self.path / layout.STATE):
            return  # it is on its way back
        held = [mark for mark in self.marks if load_state(self._file(mark))]
        first = max(held, default=0)
        state = self._stored(first) if held else self.replay.start()
        with self.job.tracked("metagradient, forwards", self.marks[-1], "steps") as advance:
            advance(first)
            for t in range(first, self.marks[-1] + 1):
                if t in self.marks and t not in held:
                    self._write(self._file(t), vars(state))
                if t < self.marks[-1]:
                    state, _ = self.replay.forward(state, t)
                    advance(1)

    def backwards(self, goal: Objective, weights: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Undo the steps, until the folder's state holds ∂J/∂w (n, j) of the pool's rows, and return J (j,) at the end.

        Args:
            goal: the target's loss.
            weights: (m, j) of the target's rows in J.
            order: (n,) the pool's rows in the order of the training's examples.
        """
        from keepset.features.metagradient import Adjoint

        written = load_state(self.path / layout.STATE)
        values, losses = written.get("values"), written.get("losses")
        left = int(written["step"]) if written else self.steps
        adjoint = Adjoint(*self._read(written, "apq")) if written and left else None
        with self.job.tracked("metagradient, backwards", self.steps, "steps") as advance:
            advance(self.steps - left)
            for mark in reversed(self.marks):
                if mark >= left:
                    continue
                state, taken = self.replay.run(self._stored(mark), mark, left)
                if values is None or losses is None or adjoint is None:
                    losses, gradient = self.replay.gradient_of(goal, state, weights)
                    values, adjoint = np.zeros((len(order), len(losses))), Adjoint.of(gradient)
                for t in range(left - 1, mark - 1, -1):
                    adjoint, slopes = self.replay.back(taken.pop(), t, adjoint)
                    values[order[self.replay.course.batches[t]]] += slopes
                    facts = {"values": values, "losses": losses, "step": np.array(t)}
                    self._write(self.path / layout.STATE, vars(adjoint) if t else {}, facts)
                    advance(1)
                left = mark
        assert losses is not None
        return losses

    def _file(self, mark: int) -> Path:
        return self.path / f"{KEPT}{mark}.safetensors"

    def _stored(self, mark: int) -> State:
        from keepset.features.metagradient import State

        return State(*self._read(load_state(self._file(mark)), ("theta", "m", "v")))

    @staticmethod
    def _write(path: Path, parts: dict[str, Tensors], facts: dict[str, np.ndarray] | None = None) -> None:
        from safetensors.numpy import save

        named = {f"{kind}.{name}": x.cpu().numpy() for kind, part in parts.items() for name, x in part.items()}
        write_atomic(path, save({**named, **(facts or {})}))

    def _read(self, arrays: dict[str, np.ndarray], kinds: Iterable[str]) -> list[Tensors]:
        import torch

        device, names = self.replay.model.device, self.replay.names
        return [{n: torch.from_numpy(arrays[f"{kind}.{n}"]).to(device) for n in names} for kind in kinds]
