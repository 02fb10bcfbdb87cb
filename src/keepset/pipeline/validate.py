"""`keepset validate`: how well every stored score says what training on its rows does, against a bank of trainings.

A score predicts a model by the sum over its rows; tasks' own parts (`task.<name>`) predict the queries of their task.
What is measured: the target's own loss, the held-out losses, the preference loss, margin and accuracy on pairs of like
length, and the task's metric, always side by side. See `keepset.evaluate.truth` for the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from keepset.errors import RecipeError, did_you_mean
from keepset.evaluate.preference import PairLogps, length_matched, preference_loss
from keepset.evaluate.statistics import Interval
from keepset.evaluate.truth import Measured, between_seeds, lds, noise_ceiling, parts_in_order
from keepset.pipeline.bank import Bank, Member
from keepset.pipeline.learn import item_metrics
from keepset.pipeline.metrics import HELD_OUT, is_loss, unit_of
from keepset.runfolder import layout
from keepset.runfolder.records import Items, Mean
from keepset.runfolder.truth import Deciles, Design, LeftOut, OutcomeFacts, ScoreFacts, Validation

if TYPE_CHECKING:
    from keepset.stages.job import Job

Arrays = dict[str, np.ndarray]

TARGET_LOSS, TARGET_PREFERENCE = "loss.target", "loss.target.preference"
OUTCOMES = (
    TARGET_LOSS, TARGET_PREFERENCE, HELD_OUT, "loss.chosen", "loss.preference", "margin.implicit_mean.matched",
    "accuracy.policy_mean.matched", "gsm8k.accuracy",
)  # fmt: skip
"""In the order in which they are told; what a recipe has no data for is left out."""
COUNTED = ("accuracy.policy_mean.matched", "gsm8k.accuracy")
"""Right or wrong: one item orders no models, so that a correlation is taken of each task's share."""


@dataclass(frozen=True)
class Tasks:
    """The task of each of the target's rows, of each held-out pair, and of those of like length; "" where unknown."""

    target: np.ndarray
    pairs: np.ndarray
    matched: np.ndarray

    def of(self, outcome: str, n: int) -> np.ndarray:
        """The tasks (n,) of an outcome's items."""
        if outcome.startswith(TARGET_LOSS):
            return self.target
        if outcome.endswith(".matched"):
            return self.matched
        return self.pairs if outcome in ("loss.chosen", "loss.preference") else np.full(n, "")


@dataclass(frozen=True)
class Outcome:
    """One measure on some models: what was measured, and each query's task."""

    measured: Measured
    tasks: tuple[str, ...]


def validate(job: Job) -> Validation:
    """Train and measure what the recipe's `validate` (or its defaults) asks for, judge all scores, keep the verdict.

    Raises:
        RecipeError: nothing to measure, fewer than three trainings of a kind, or a label without scores.
    """
    bank = Bank(job)
    if not bank.looked_at() and job.recipe.evaluate.gsm8k is None:
        raise RecipeError(
            "validate: nothing to measure: the recipe has no target and no held-out data under `evaluate`"
        )
    tables = scores_of(job, bank)
    for label in bank.spec.deciles:
        if label not in tables:
            hint = did_you_mean(label, list(tables)) or f"; there are: {', '.join(tables)}"
            raise RecipeError(f"validate.deciles: no scores by '{label}'{hint}")
    bank.check()
    works = list(bank.works())
    training = [work for work in works if work.kind == "train"]
    tokens = sum(work.tokens for work in training)
    job.say(
        f"validate: {sum(w.trainings for w in training)} trainings on parts of {len(bank.ids)} rows, {tokens} tokens"
    )
    judge = Judge(job, bank, tables, bank.measure(None))
    halves, again, left_out = bank.halves(), bank.again(), bank.left_out()
    designs = [judge.design("halves", halves, again)] if halves else []
    designs += [judge.design("leave-out", left_out, [])] if left_out else []
    deciles = [one for label in bank.spec.deciles for one in judge.deciles(label)]
    titles = {title for work in works for title in work.titles}
    place = f"evaluate {layout.VALIDATION_FOLDER}/"
    spent = [e for e in job.run.costs() if e["stage"] in titles or e["stage"].startswith(place)]
    result = Validation(
        rows=len(bank.ids), tokens=tokens, seconds=round(sum(e["seconds"] for e in spent), 2),
        designs=tuple(designs), deciles=tuple(deciles),
        left_out=tuple(judge.worth(left_out)),
        unscored={label: int(np.isnan(t["score"]).sum()) for label, t in tables.items() if np.isnan(t["score"]).any()},
    )  # fmt: skip
    job.run.save_json(layout.VALIDATION, result.to_json())
    return result


def scores_of(job: Job, bank: Bank) -> dict[str, Arrays]:
    """By label, the `score` (n,) of the bank's rows and the parts `task.<name>`; NaN where a row has none.

    Raises:
        RecipeError: nothing is scored, or a table that lacks rows of the bank.
    """
    order = [m.label for m in job.recipe.methods]
    labels = sorted(p.stem for p in (job.run.path / layout.SCORES_FOLDER).glob("*.parquet"))
    labels.sort(key=lambda label: (order.index(label) if label in order else len(order), label))
    if not labels:
        raise RecipeError(f"{job.run.path}: nothing scored yet; `keepset run` or `keepset score METHOD` first")
    found = {}
    for label in labels:
        table = job.run.load_table(layout.scores(label))
        place = {row_id: i for i, row_id in enumerate(table["id"].to_pylist())}
        lacking = [str(i) for i in bank.ids if str(i) not in place]
        if lacking:
            raise RecipeError(
                f"{label}: {len(lacking)} rows aren't in its scores, the first is {lacking[0]}; score again"
            )
        take = pa.array([place[str(i)] for i in bank.ids])
        names = ["score", *(n for n in table.column_names if n.startswith("task."))]
        columns = {n: table[n].take(take).cast(pa.float64()).to_numpy(zero_copy_only=False) for n in names}
        found[label] = {n: np.where(np.isfinite(v), v, np.nan) for n, v in columns.items()}
    return found


class Judge:
    """Holds scores against models."""

    def __init__(self, job: Job, bank: Bank, tables: Mapping[str, Arrays], base: Arrays) -> None:
        self.job, self.bank, self.tables, self.base = job, bank, tables, (Items.from_arrays(base), base)
        self.known: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.resamples, self.seed = job.recipe.evaluate.bootstrap, job.recipe.seed
        share, learner = job.recipe.evaluate.length_match, bank.learner
        pairs = learner.eval_pairs[1] if learner.eval_pairs else np.zeros(0, dtype=str)
        logps = self.base[0].pairs
        matched = length_matched(logps["n_chosen"], logps["n_rejected"], share) if logps else np.zeros(0, dtype=bool)
        target = learner.target_sides[1] if job.recipe.target else np.zeros(0, dtype=str)
        self.tasks = Tasks(target, pairs, pairs[matched])

    def measured(self, members: list[Member]) -> list[dict[str, np.ndarray]]:
        """Each model's items by outcome, trained and measured where that is not done."""
        self.bank.share(members)
        for number, member in enumerate(members, start=1):
            if (member.name, member.seed) in self.known:
                continue
            self.job.say(f"{member.name}, seed {member.seed}: {number} of {len(members)}")
            self.bank.train(member)
            arrays = self.bank.measure(member)
            metrics = item_metrics(Items.from_arrays(arrays), self.base[0], self.job.recipe.evaluate.length_match)
            metrics |= target_metrics(arrays, self.base[1])
            self.known[member.name, member.seed] = {name: metrics[name] for name in OUTCOMES if name in metrics}
        return [self.known[member.name, member.seed] for member in members]

    def outcome(self, name: str, models: list[dict[str, np.ndarray]]) -> Outcome:
        """One measure on some models, larger is better."""
        items = (-1 if is_loss(name) else 1) * np.stack([model[name] for model in models])
        tasks = self.tasks.of(name, items.shape[1])
        if name not in COUNTED:
            return Outcome(Measured(items, np.arange(items.shape[1])), tuple(tasks))
        names, groups = np.unique(tasks, return_inverse=True)
        return Outcome(Measured(items, groups), tuple(str(n) for n in names))

    def predictions(self, kept: np.ndarray, measure: str, tasks: tuple[str, ...]) -> tuple[Arrays, Arrays]:
        """By label, (M, Q) or (M, 1) sums of the scores of each model's rows for the queries, and (M, 1) in all.

        A query is predicted by the part for its task, or for itself: rows of the target under `per: query`.
        """
        by_query, in_all = {}, {}
        for label, columns in self.tables.items():
            sums = {name: kept @ filled(values) for name, values in columns.items()}
            in_all[label] = sums["score"][:, None]
            own = [sums.get(f"task.{task}") for task in tasks]
            rows = [sums.get(f"task.{task}.{k}") for k, task in enumerate(tasks)]
            if measure.startswith("loss.target") and all(one is not None for one in rows):
                own = rows
            if any(one is not None for one in own):
                by_query[label] = np.stack([sums["score"] if one is None else one for one in own], axis=1)
            else:
                by_query[label] = in_all[label]
        return by_query, in_all

    def design(self, name: str, members: list[Member], again: list[Member]) -> Design:
        """Judge all scores by some models and those trained again."""
        models, second = self.measured(members), self.measured(again)
        kept = np.stack([member.kept for member in members]).astype(float)
        outcomes, scores = [], []
        for measure in models[0]:
            outcome = self.outcome(measure, models)
            by_query, in_all = self.predictions(kept, measure, outcome.tasks)
            found = lds(by_query, outcome.measured, resamples=self.resamples, seed=self.seed)
            whole = lds(in_all, outcome.measured.whole(), resamples=self.resamples, seed=self.seed)
            scores += [ScoreFacts(label, measure, mean(found[label]), mean(whole[label])) for label in self.tables]
            outcomes.append(self.facts(measure, outcome, models, second))
        size = int(np.median(kept.sum(axis=1)))
        return Design(name, len(members), len(again), size, tuple(outcomes), tuple(scores))

    def facts(
        self, measure: str, outcome: Outcome, models: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]
    ) -> OutcomeFacts:
        """What an outcome is, and how far a second training agrees with it."""
        spread = float(outcome.measured.items.mean(axis=1).std(ddof=1))
        facts = OutcomeFacts(measure, outcome.measured.queries, spread, unit(measure))
        if not second:
            return facts
        one, two = (self.outcome(measure, some).measured for some in (models[: len(second)], second))
        each = between_seeds(one, two, resamples=self.resamples, seed=self.seed)
        whole = between_seeds(one.whole(), two.whole(), resamples=self.resamples, seed=self.seed)
        return replace(
            facts, between_seeds=mean(each), ceiling=ceiling_of(each), between_seeds_of_mean=mean(whole),
            ceiling_of_mean=ceiling_of(whole),
        )  # fmt: skip

    def deciles(self, label: str) -> list[Deciles]:
        """Judge one score by the models of its tenths, averaged over seeds."""
        members = self.bank.tenths(label, self.tables[label]["score"])
        models, seeds = self.measured(members), len(self.bank.spec.seeds)
        found = []
        for measure in models[0]:
            means = np.array([float(model[measure].mean()) for model in models]).reshape(seeds, -1).mean(axis=0)
            rho, p = parts_in_order(-means if is_loss(measure) else means, seed=self.seed)
            found.append(Deciles(label, measure, tuple(means.tolist()), rho, p, seeds))
        return found

    def worth(self, members: list[Member]) -> list[LeftOut]:
        """What each block of rows that was left out was worth: by how much better the model of all rows is."""
        if not members:
            return []
        whole, *without = self.measured(members)
        found = []
        for member, model in zip(members[1:], without, strict=True):
            gone = {m: float((whole[m] - model[m]).mean()) * (-1 if is_loss(m) else 1) for m in model}
            found.append(LeftOut(tuple(str(i) for i in self.bank.ids[~member.kept]), gone))
        return found


def target_metrics(arrays: Arrays, base: Arrays) -> dict[str, np.ndarray]:
    """The target's losses (q,): of chosen answers in nats a token; of pairs, also the preference loss."""
    if "target.chosen" not in arrays:
        return {}
    found = {TARGET_LOSS: -arrays["target.chosen"] / arrays["target.n_chosen"]}
    if "target.rejected" in arrays:
        found[TARGET_PREFERENCE] = preference_loss(target_logps(arrays), target_logps(base))
    return found


def target_logps(arrays: Arrays) -> PairLogps:
    """The target's pairs."""
    return PairLogps(*(arrays[f"target.{name}"] for name in ("chosen", "rejected", "n_chosen", "n_rejected")))


def filled(values: np.ndarray) -> np.ndarray:
    """Scores (n,) with their mean in place of NaN: a row without a score speaks neither for a model nor against it."""
    return np.where(np.isnan(values), np.nanmean(values) if np.isfinite(values).any() else 0.0, values)


def ceiling_of(agreement: Interval) -> float | None:
    """The noise ceiling; None where no outcome varies."""
    return None if np.isnan(agreement.value) else noise_ceiling(agreement.value)


def mean(interval: Interval) -> Mean:
    """As a record."""
    return Mean(**vars(interval))


def unit(measure: str) -> str:
    """The unit of an outcome."""
    return {TARGET_LOSS: "nats a token", TARGET_PREFERENCE: "nats a pair"}.get(measure) or unit_of(measure)
