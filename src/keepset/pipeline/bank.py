"""Trainings that judge scores: on random halves, with rows left out, on tenths of a score; what is measured on them.

All but the tenths see the same rows in the same batches from the same start; a row that is left out has weight 0 in the
loss, whose divisor stays that of the whole batch (`train.training.Training.weights`). So two models of one seed differ
by their rows alone. Each training and each measurement is a step of the run folder: made once, whoever looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays

from keepset.errors import RecipeError
from keepset.evaluate.heldout import heldout_losses
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.pipeline.learn import Learner, evaluation_key, in_order, measure_model, trained_model
from keepset.recipe import ValidateSpec
from keepset.row_ids import id_order
from keepset.runfolder import layout
from keepset.runfolder.execute import Task
from keepset.runfolder.files import digest, write_atomic
from keepset.stages.executors import executor
from keepset.stages.losses import forward
from keepset.stages.stage import VERSION, Work, job_of, recipe_of

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job

PARTS = 10
WHOLE = "whole"


@dataclass(frozen=True)
class Member:
    """One training.

    Attributes:
        name: its folder's, without the seed.
        seed: of the adapter's start and the order of the rows.
        kept: (n,) which of the bank's rows count.
        alone: the kept rows are all there is (tenths), instead of standing among masked ones.
    """

    name: str
    seed: int
    kept: np.ndarray
    alone: bool = False


@dataclass(frozen=True)
class Members:
    """Members of a recipe's bank, for any process: name, seed, 1 for each row that counts, `alone`."""

    recipe: str
    plan: tuple[tuple[str, int, str, bool], ...]


def make_members(own: Members, numbers: Sequence[int]) -> None:
    """Train and measure some members, in whatever process; what was done before is kept."""
    job = job_of(own.recipe)
    bank = job.once_a_recipe("bank", lambda: Bank(job))
    for number in numbers:
        name, seed, kept, alone = own.plan[number]
        member = Member(name, seed, np.array([c == "1" for c in kept]), alone)
        bank.train(member)
        bank.measure(member)


class Bank:
    """The rows, the trainings and the outcomes that scores of a job are held against."""

    def __init__(self, job: Job) -> None:
        """Take the recipe's `validate`, or its defaults."""
        self.job, self.spec = job, job.recipe.validation or ValidateSpec()
        self.learner = Learner(job)

    @cached_property
    def rows(self) -> tuple[np.ndarray, list[tuple[Encoded, ...]]]:
        """Indices (n,) into the job's usable rows, by id, and their sides as the trained model's tokens.

        Raises:
            RecipeError: fewer than four rows.
        """
        order = id_order(self.job.ids)
        drawn = np.random.default_rng(self.job.recipe.seed).permutation(len(order))[: self.spec.rows]
        indices = order[np.sort(drawn)]
        sides = self.learner.sides(indices, layout.VALIDATION_FOLDER)
        whole = [i for i, side in enumerate(sides) if side is not None]
        if len(whole) < 4:
            raise RecipeError(f"validate: {len(whole)} usable rows; at least 4, or there are no halves to tell apart")
        return indices[whole], [side for side in sides if side is not None]

    @property
    def ids(self) -> np.ndarray:
        """(n,) the rows' ids."""
        return self.job.ids[self.rows[0]].astype(object)

    def halves(self) -> list[Member]:
        """A training on each random half; the k-th half is the same whatever their number."""
        n, first = len(self.ids), self.spec.seeds[0]
        drawn = [np.random.default_rng([self.job.recipe.seed, k]).permutation(n) for k in range(self.spec.models)]
        return [Member(f"half-{k:03d}", first, order < n // 2) for k, order in enumerate(drawn)]

    def again(self) -> list[Member]:
        """The first halves with the second seed."""
        if len(self.spec.seeds) < 2:
            return []
        return [replace(half, seed=self.spec.seeds[1]) for half in self.halves()[: self.spec.again]]

    def left_out(self) -> list[Member]:
        """The training on all rows, and those with a block of rows left out; empty if none is asked for."""
        n, size, first = len(self.ids), self.spec.block, self.spec.seeds[0]
        if not self.spec.leave_out:
            return []
        order = np.random.default_rng([self.job.recipe.seed, 1, 0]).permutation(n)
        blocks = [order[start : start + size] for start in range(0, n, size)][: self.spec.leave_out]
        out = [Member(f"without-{k:03d}", first, ~np.isin(np.arange(n), block)) for k, block in enumerate(blocks)]
        return [Member(WHOLE, first, np.ones(n, dtype=bool)), *out]

    def tenths(self, label: str, score: np.ndarray) -> list[Member]:
        """A training on each tenth of the scored rows, best first, with every seed.

        Args:
            label: the score's.
            score: (n,) of the bank's rows, NaN where there is none.

        Raises:
            RecipeError: fewer than ten scored rows.
        """
        scored = int(np.isfinite(score).sum())
        if scored < PARTS:
            raise RecipeError(f"validate.deciles: '{label}' scores {scored} of the rows; tenths need at least {PARTS}")
        ranked = np.lexsort((self.ids.astype(str), np.where(np.isfinite(score), -score, np.inf)))[:scored]
        parts = np.array_split(ranked, PARTS)
        return [
            Member(f"tenth-{label}-{k}", seed, np.isin(np.arange(len(score)), part), alone=True)
            for seed in self.spec.seeds
            for k, part in enumerate(parts)
        ]

    def check(self) -> None:
        """Refuse what gives too few models to order, and a training that can't mask rows.

        Raises:
            RecipeError: as said.
        """
        spec = self.spec
        if not (spec.models or spec.leave_out or spec.deciles):
            raise RecipeError("validate: nothing to train; set validate.models, validate.leave_out or validate.deciles")
        for name, count in (("models", spec.models), ("leave_out", len(self.left_out()))):
            if 0 < count < 3:
                raise RecipeError(f"validate.{name}: {count} trainings order nothing; take at least 3")
        if spec.models and 0 < min(spec.again, spec.models) < 3:
            raise RecipeError("validate.again: fewer than 3 trainings give no noise ceiling; take at least 3, or 0")

    # -- training and measuring ---------------------------------------------------------------------------------------

    def sides_of(self, member: Member) -> list[tuple[Encoded, ...]]:
        """The rows that are run."""
        return [side for side, kept in zip(self.rows[1], member.kept, strict=True) if kept]

    def cost(self, member: Member) -> tuple[int, float]:
        """Tokens and operations of a training, over its epochs."""
        args = self.job.recipe.train
        n_tokens, n_head = count_tokens(trained_sides(self.sides_of(member), args))
        work = flops(self.learner.loaded.model, n_tokens, n_head, passes=3 if args.full else 2) * args.num_train_epochs
        return int(n_tokens * args.num_train_epochs), work

    def train(self, member: Member) -> None:
        """Train, unless that was done with the same rows, mask, arguments and seed."""
        from keepset.train.fit import fit_training
        from keepset.train.training import Training

        job, learner, args = self.job, self.learner, self.job.recipe.train
        folder = layout.validation_model(member.name, member.seed)

        def work(path: Path) -> dict[str, Any]:
            tokens, operations = self.cost(member)
            with job.run.timed(f"train {folder}", rows=int(member.kept.sum())) as spent:
                job.release()
                learner.holder.release()
                weights = None if member.alone else member.kept.astype(float).tolist()
                sides = self.sides_of(member) if member.alone else self.rows[1]
                training = Training(learner.spec, job.recipe.lora, args, member.seed, weights=weights)
                result = fit_training(training, sides, path)
                spent.update(tokens=tokens, flops=operations)
            return {"seconds": result.seconds, "steps": result.steps, "rows": int(member.kept.sum()),
                    "tokens": tokens}  # fmt: skip

        job.run.step(folder, self.key(member), work)

    def key(self, member: Member) -> dict[str, Any]:
        """Everything that a training depends on."""
        learner, args, ids = self.learner, self.job.recipe.train, [str(i) for i in self.ids]
        kept = [i for i, is_in in zip(ids, member.kept, strict=True) if is_in]
        return {
            "version": VERSION, "model": learner.holder.fingerprint, "encoder": learner.encoder.fingerprint,
            "lora": None if args.full else self.job.recipe.lora.model_dump(), "args": args.key(), "seed": member.seed,
            "ids": digest(kept if member.alone else ids), "kept": digest(kept),
        }  # fmt: skip

    def share(self, members: list[Member]) -> None:
        """Have members trained and measured by the job's executor, where it takes whole trainings."""
        job, who = self.job, executor(self.job)
        if not who.trains:
            return
        plan = tuple((m.name, m.seed, "".join(map(str, m.kept.astype(int))), m.alone) for m in members)
        task = Task(make_members, Members(recipe_of(job), plan), digest(["members", plan])[:16])

        def is_there(number: int) -> bool:
            member = members[number]
            folder = layout.validation_measured(member.name, member.seed)
            trained = job.run.whole(layout.validation_model(member.name, member.seed), self.key(member))
            return trained is not None and job.run.whole(folder, self.measured_key(member)) is not None

        missing = [number for number in range(len(members)) if not is_there(number)]
        if missing:
            job.say(f"validate: {len(missing)} of {len(members)} models are trained and measured by workers")
            who.run(task, missing, is_there=is_there, advance=lambda n: job.say(f"{members[n].name}: done"))
            job.run.meter.collect()

    def measured_key(self, member: Member | None) -> dict[str, Any]:
        """Everything that a model's arrays depend on."""
        job = self.job
        weights = None if member is None else job.run.path / layout.validation_model(member.name, member.seed)
        target = in_order(job.target, "task") if job.recipe.target else None
        return {**evaluation_key(job, self.learner, weights), "target": target}

    def measure(self, member: Member | None) -> dict[str, np.ndarray]:
        """The arrays that outcomes are made of, of a trained model or (None) the base; measured once.

        Returns:
            Those of `runfolder.records.Items`, and of the target's q rows `target.chosen`, `target.n_chosen` and, where
            all are pairs, `target.rejected`, `target.n_rejected`, each (q,).
        """
        job, learner = self.job, self.learner
        name, seed = ("base", None) if member is None else (member.name, member.seed)
        weights = None if member is None else job.run.path / layout.validation_model(name, member.seed)
        folder = layout.validation_measured(name, seed)

        def work(path: Path) -> dict[str, Any]:
            operations = flops(learner.loaded.model, *count_tokens(self.looked_at()), passes=1)
            tokens = sum(len(side.input_ids) for side in self.looked_at())
            with (
                job.run.timed(f"evaluate {folder}", tokens=tokens, flops=operations),
                trained_model(learner, weights) as model,
            ):
                items, _ = measure_model(job, learner, model)
                arrays = {**items.to_arrays(), **self.measure_target(model)}
            write_atomic(path / layout.ITEMS, save_arrays(arrays))
            return {}

        job.run.step(folder, self.measured_key(member), work)
        return load_file(str(job.run.path / folder / layout.ITEMS))

    def measure_target(self, model: Any) -> dict[str, np.ndarray]:
        """The target's log-probabilities under a model; see `measure`."""
        if not self.job.recipe.target:
            return {}
        pairs, budget = self.learner.target_sides[0], self.job.recipe.batching.token_budget
        sides: dict[str, list[Any]] = {"chosen": [chosen for chosen, _ in pairs]}
        if all(rejected is not None for _, rejected in pairs):
            sides["rejected"] = [rejected for _, rejected in pairs]
        columns: dict[str, np.ndarray] = {}
        for name, rows in sides.items():
            losses = heldout_losses(model, rows, token_budget=budget)
            columns |= {f"target.{name}": -losses.nll, f"target.n_{name}": losses.n_tokens}
        return columns

    def looked_at(self) -> list[Encoded]:
        """Every side that a model is measured on."""
        learner = self.learner
        sides = [side for pair in learner.eval_pairs[0] for side in pair] if learner.eval_pairs else []
        sides += learner.eval_rows[0] if learner.eval_rows else []
        if self.job.recipe.target:
            pairs = learner.target_sides[0]
            both = all(rejected is not None for _, rejected in pairs)
            sides += [side for pair in pairs for side in (pair if both else pair[:1]) if side is not None]
        return sides

    # -- price --------------------------------------------------------------------------------------------------------

    def works(self) -> Iterator[Work]:
        """The price, from counts: every training's own tokens, and a forward pass over what is measured.

        The tenths of a score together are its rows, whichever they are.
        """
        models = 1
        whole = Member(WHOLE, 0, np.ones(len(self.ids), dtype=bool))
        for label in self.spec.deciles:
            parts = [Member(f"tenth-{label}-{k}", seed, whole.kept) for seed in self.spec.seeds for k in range(PARTS)]
            one = self.work(f"validate: tenths of {label}", [whole] * len(self.spec.seeds), parts)
            yield replace(one, methods=label)
            models += len(parts)
        for name, members in (
            ("random halves", self.halves()), ("halves again", self.again()), ("leave rows out", self.left_out())
        ):  # fmt: skip
            if members:
                yield self.work(f"validate: {len(members)} {name}", members, members)
                models += len(members)
        measured = forward(self.job, f"validate: measure {models} models", self.looked_at())
        yield replace(measured, methods="all", rows=measured.rows * models, tokens=measured.tokens * models,
                      flops=measured.flops * models)  # fmt: skip

    def work(self, stage: str, run: list[Member], members: list[Member]) -> Work:
        """What `members` cost, of which together the rows of `run` are run."""
        costs = [self.cost(member) for member in run]
        titles = tuple(f"train {layout.validation_model(m.name, m.seed)}" for m in members)
        return Work(stage, "train", int(sum(m.kept.sum() for m in run)), sum(t for t, _ in costs),
                    sum(f for _, f in costs), titles=titles, trainings=len(members), methods="all")  # fmt: skip
