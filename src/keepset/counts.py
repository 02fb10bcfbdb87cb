"""The stages that methods need, with their rows, tokens and operations: what `plan` times and `compare` prices.

Counts come from the recipe and the pool alone, so they are the same before a run, after it, and after a run that was
killed and resumed; only seconds are measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.cost import count_tokens, flops, trained_sides
from keepset.encoding import content_only
from keepset.recipe import MethodSpec, TrainSpec, parse_budget
from keepset.scoring import METHODS, options_of
from keepset.scoring_gradients import in_run_request, influence_request, retraining_request

if TYPE_CHECKING:
    from keepset.encoding import Encoded
    from keepset.finals import Learner
    from keepset.job import Job

    Sides = tuple[Encoded, ...]


@dataclass(frozen=True)
class Work:
    """One stage: who needs it, its rows, tokens and operations, and its entries in `costs.jsonl` (a pattern)."""

    stage: str
    methods: str
    kind: Literal["forward", "backward", "train"]
    rows: int
    tokens: int
    flops: float
    logged: str = ""
    trainings: int = 1

    def times(self, n: int, stage: str, methods: str) -> Work:
        """The same stage done n times, under another name."""
        return replace(
            self, stage=stage, methods=methods, rows=self.rows * n, tokens=self.tokens * n, flops=self.flops * n,
            trainings=self.trainings * n,
        )  # fmt: skip


def forward(
    job: Job, stage: str, methods: str, rows: list[Encoded], logged: str = "", *, times: int = 1, head: bool = True
) -> Work:
    """`times` forward passes over `rows`, with the output head on supervised positions or without it."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head if head else 0, passes=times)
    return Work(stage, methods, "forward", len(rows), n_tokens * times, work, logged)


def backward(
    job: Job, stage: str, methods: str, rows: list[Encoded], logged: str, *, passes: float, times: int = 1
) -> Work:
    """`times` passes forward and backward through frozen weights over `rows`."""
    n_tokens, n_head = count_tokens(rows)
    work = flops(job.loaded.model, n_tokens, n_head, passes=passes * times)
    return Work(stage, methods, "backward", len(rows), n_tokens * times, work, logged)


def training(job: Job, stage: str, methods: str, sides: list[Sides], args: TrainSpec, logged: str = "") -> Work:
    """A fine-tuning on rows, given as their sides."""
    n_tokens, n_head = count_tokens(trained_sides(sides, args))
    work = flops(job.loaded.model, n_tokens, n_head, passes=3 if args.full else 2) * args.num_train_epochs
    return Work(stage, methods, "train", len(sides), int(n_tokens * args.num_train_epochs), work, logged)


def selection_work(job: Job, methods: list[MethodSpec]) -> list[Work]:
    """The model stages that `methods` need together, each counted once. Methods without a model need none."""
    recipe, found = job.recipe, []

    def users(need: str) -> str:
        return ", ".join(m.label for m in methods if need in METHODS[m.name].needs)

    content = [m for m in methods if m.options.get("end_of_turn") is False]
    whole = ", ".join(m.label for m in methods if "losses" in METHODS[m.name].needs and m not in content)
    if whole:
        found.append(forward(job, "losses under the base", whole, job.rows, r"losses \(base( and reference)?\)"))
    if content:
        end, logged = job.loaded.encoder.end_of_turn, r"losses \((base-content and )?reference-content\)"
        rows = [content_only(r, end) for r in job.rows]
        inner = ", ".join(m.label for m in content)
        found.append(forward(job, "losses without ends of turns", inner, rows, logged, times=2))
    if users("error-norms"):
        norms = forward(job, "error norms under the base", users("error-norms"), job.rows, r"error norms \(base\)")
        found.append(norms)
    if users("answers"):
        answers = [answer_alone(r) for r in job.rows]
        found.append(forward(job, "losses of answers alone", users("answers"), answers, r"losses \(answers alone\)"))
    if users("reference"):
        found += reference_work(job, [m for m in methods if "reference" in METHODS[m.name].needs])
        both = ", ".join(m.label for m in methods if m.options.get("side", "chosen") != "chosen")
        if both and job.rejected is not None:
            logged = r"losses \((base-rejected and )?reference-rejected\)"
            found.append(forward(job, "losses of the rejected sides", both, job.rejected, logged, times=2))
    trained = ", ".join(m.label for m in methods if {"warmup", "gradients"} & set(METHODS[m.name].needs))
    if trained and not recipe.warmup.path:
        from keepset.stages import warmup_rows

        sides = [job.sides[1][i] for i in warmup_rows(job)[0]]
        found.append(training(job, "warm-up", trained, sides, recipe.warmup, "train models/warmup"))
    if users("checkpoint-losses"):
        found.append(
            forward(job, "losses at the checkpoints", users("checkpoint-losses"), job.rows,
                    r"losses \(checkpoint-\d+\)", times=checkpoints(job))
        )  # fmt: skip
    if users("gradients"):
        found += gradient_work(job, methods)
    if users("in-run"):
        found += [in_run_work(job, m) for m in methods if m.name == "in-run-shapley"]
    if users("retraining"):
        found += [retraining_work(job, m) for m in methods if m.name == "tmc-shapley"]
    if users("representations"):
        pooled: dict[str, list[str]] = {}
        for m in methods:
            if "representations" in METHODS[m.name].needs and not m.options.get("embedding_model"):
                pooled.setdefault(pooling(m), []).append(m.label)
        for how, labels in pooled.items():
            logged = rf"representations \({how}\)"
            found.append(forward(job, f"representations ({how})", ", ".join(labels), job.rows, logged, head=False))
    return found


def pair_gradients(job: Job) -> bool:
    """Whether a row's gradient is that of a preference loss: a pool of pairs, chosen from for such a training."""
    return job.pool.has_pairs and job.recipe.train.loss != "sft"


def gradient_rows(job: Job) -> list[tuple[Encoded, ...]]:
    """The sides whose gradients are formed, cut after `gradients.max_completion_tokens` supervised tokens."""
    cap = job.recipe.gradients.max_completion_tokens
    sides = job.sides[1] if pair_gradients(job) else [row[:1] for row in job.sides[1]]
    return sides if cap is None else [tuple(first_supervised(side, cap) for side in row) for row in sides]


def first_supervised(row: Encoded, n: int) -> Encoded:
    """A row cut after its first n supervised tokens."""
    where = np.flatnonzero(row.supervised)
    if len(where) <= n:
        return row
    end = int(where[n - 1]) + 1
    return replace(row, input_ids=row.input_ids[:end], supervised=row.supervised[:end], truncated=True)


def gradient_passes(job: Job) -> float:
    """Forward-equivalents of a gradient pass: the backward part ends below the lowest layer that is looked at."""
    depth, layers = job.recipe.gradients.last_layers, job.loaded.model.config.get_text_config().num_hidden_layers
    weighing = 2.0 if pair_gradients(job) else 0.0  # a pair's weight in its loss: policy and reference, forward
    return weighing + (2.0 if depth is None else 1.0 + min(1.0, depth / layers))


def answer_alone(row: Encoded, start: int = 0) -> Encoded:
    """A row's supervised tokens after the single token `start`, all of them supervised."""
    from keepset.encoding import Encoded

    ids = np.concatenate([[start], row.input_ids[row.supervised]]).astype(np.int32)
    return Encoded(ids, np.arange(len(ids)) > 0, row.truncated)


def checkpoints(job: Job) -> int:
    """How many warm-up checkpoints the scores use."""
    spec = job.recipe.warmup
    return int(np.ceil(spec.num_train_epochs)) if spec.checkpoints == "all" else 1


def pooling(spec: MethodSpec) -> str:
    """How a representation method pools: its option, or its default."""
    return (
        "weighted_mean"
        if spec.name == "rds+"
        else str(spec.options.get("pooling", options_of(spec.name)["pooling"][1]))
    )


def reference_work(job: Job, specs: list[MethodSpec]) -> list[Work]:
    """Training the reference (or one for each fold) and scoring every row under it."""
    spec, found = job.recipe.reference, []
    methods = ", ".join(m.label for m in specs)
    whole = ", ".join(m.label for m in specs if m.options.get("end_of_turn") is not False)
    folds = spec.folds if spec.folds >= 2 else 0
    if folds:
        from keepset.methods.cross_fit import fold_of

        fold = fold_of(job.ids, folds)
        for k in range(folds):
            rows = [r for r, f in zip(job.sides[1], fold, strict=True) if f != k]
            folder = f"train models/reference-fold{k}"
            found.append(training(job, f"train reference {k + 1} of {folds}", methods, rows, spec, folder))
    elif not spec.path:
        found.append(training(job, "train the reference", methods, job.sides[1], spec, "train models/reference"))
    logged = r"losses \(((base and )?reference|fold\d+)\)"
    return [*found, forward(job, "losses under the reference", whole, job.rows, logged)] if whole else found


def gradient_work(job: Job, methods: list[MethodSpec]) -> list[Work]:
    """One pass over the pool for each map and checkpoint, and the target's gradients."""
    from keepset.stages_gradients import curvature_rows

    users = [m for m in methods if "gradients" in METHODS[m.name].needs]
    requests = {m.label: influence_request(m.name, m.options) for m in users}
    sides = [side for pair in job.target_pairs[0] for side in pair if side is not None]
    chosen = [pair[0] for pair in job.target_pairs[0]]
    found: list[Work] = []
    target_passes = gradient_passes(job) - (2.0 if pair_gradients(job) else 0.0)
    for map_ in dict.fromkeys(r.map for r in requests.values()):
        # influence functions look at the last checkpoint alone
        many = checkpoints(job) if any(r.map == map_ and r.curvature is None for r in requests.values()) else 1
        labels = ", ".join(label for label, r in requests.items() if r.map == map_)
        logged = rf"gradients at \S+ \({map_}\)"
        rows = [side for row in gradient_rows(job) for side in row]
        found.append(
            backward(job, f"gradients ({map_}) x{many}", labels, rows, logged, passes=gradient_passes(job), times=many)
        )
        plain = {label: replace(r, curvature=None) for label, r in requests.items() if r.map == map_}
        for request in dict.fromkeys(plain.values()):
            rows = chosen if request.loss == "sft" else sides
            labels = ", ".join(label for label, r in plain.items() if r == request)
            stage = f"target gradients ({request.loss}) x{many}"
            found.append(backward(job, stage, labels, rows, "", passes=target_passes, times=many))
    for label, request in requests.items():
        if request.curvature is not None:
            # conjugate gradients stop by themselves: some 30 products of two passes each are assumed
            times = {"fisher": 1, "cg": 1 + 2 * 30}.get(request.curvature.solver, 2)
            rows = curvature_rows(job, request.curvature)
            stage = f"curvature ({request.curvature.solver})"
            found.append(backward(job, stage, label, rows, "", passes=target_passes, times=times))
    return found


def in_run_work(job: Job, spec: MethodSpec) -> Work:
    """The SGD run of in-run Shapley: every batch and the target's gradients at every step."""
    from keepset.stages_shapley import in_run_batches, in_run_cost

    run = in_run_request(spec.options)
    batches = [[job.rows[i] for i in batch] for batch in in_run_batches(job.ids, run)]
    costs = [in_run_cost(job, batch, run.second_order) for batch in batches]
    tokens, work = sum(t for t, _ in costs), sum(f for _, f in costs)
    rows = sum(len(b) for b in batches)
    return Work(f"in-run Shapley, {len(batches)} steps", spec.label, "backward", rows, tokens, work, "in-run Shapley")


def retraining_work(job: Job, spec: MethodSpec) -> Work:
    """The trainings of Monte-Carlo Shapley, each set of players once, none cut short by the tolerance."""
    from keepset.stages_shapley import players_of, retraining_cost, retraining_sets

    run = retraining_request(spec.options)
    players = players_of(job, run)
    sets = [[job.rows[i] for p in some for i in players[p][1]] for some in retraining_sets(len(players), run)]
    costs = [retraining_cost(job, rows) for rows in sets]
    tokens, work = sum(t for t, _ in costs), sum(f for _, f in costs)
    rows = sum(len(s) for s in sets)
    return Work(
        f"train {len(sets)} models (Shapley)", spec.label, "train", rows, tokens, work, r"retraining \(Shapley\)"
    )


def final_work(job: Job) -> list[Work]:
    """Training and evaluating a model for every subset and seed; rows of middle length stand for the unknown choice."""
    from keepset.finals import Learner, direct_args

    recipe = job.recipe
    learner = Learner(job)
    sides: list[Encoded] = [side for pair in learner.eval_pairs[0] for side in pair] if learner.eval_pairs else []
    sides += learner.eval_rows[0] if learner.eval_rows else []
    if not sides:
        return []
    lengths = np.array([len(r.input_ids) for r in job.rows])
    found, models = [], 1
    for budget in recipe.budget:
        unit, amount = parse_budget(budget, len(job.rows), int(job.n_tokens().sum()))
        n_rows = min(len(job.rows), amount if unit == "rows" else max(1, int(amount / job.n_tokens().mean())))
        middle = np.argsort(np.abs(lengths - lengths.mean()), kind="stable")[:n_rows]
        longest = np.argsort(-job.n_tokens(), kind="stable")[:n_rows]
        count = (len(recipe.methods) + len(recipe.mix)) * len(recipe.train_seeds) + len(recipe.controls.random_seeds)
        one = training(job, "", "", [job.sides[1][i] for i in middle], recipe.train)
        found.append(one.times(count, f"train {count} models on {budget}", "methods, random"))
        models += count
        if recipe.controls.longest:
            found.append(
                training(
                    job, f"train on the longest {budget}", "longest", [job.sides[1][i] for i in longest], recipe.train
                )
            )
            models += 1
    if recipe.controls.full:
        found.append(training(job, "train on the full pool", "full", job.sides[1], recipe.train))
        models += 1
    if recipe.controls.dpo_direct:
        many = len(recipe.train_seeds)
        one = training(job, "", "", learner.target_pairs, direct_args(job))
        found.append(one.times(many, "DPO on the target's pairs", "dpo-direct"))
        models += many
    checked = held_out_check(job, learner)
    return [*found, *checked, forward(job, "", "", sides).times(models, f"evaluate {models} models", "all")]


def held_out_check(job: Job, learner: Learner) -> list[Work]:
    """Base and reference on evaluation rows, which tell whether the reference learnt more than its own rows."""
    from keepset.reference_check import rows_to_check

    labels, rows = rows_to_check(job, learner)
    logged = r"losses \(heldout-(base|reference)( and heldout-reference)?\)"
    return [forward(job, "reference on held-out rows", ", ".join(labels), rows, logged, times=2)] if rows else []
