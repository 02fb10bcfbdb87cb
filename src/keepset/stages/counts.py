"""The stages that methods need, with their rows, tokens and operations: what `plan` times and `compare` prices.

Counts come from the recipe and the pool alone, so they are the same before a run, after it, and after a run that was
killed and resumed; only seconds are measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keepset.budget_text import parse_budget
from keepset.methods.gradient import in_run_request, influence_request, retraining_request
from keepset.methods.table import METHODS, options_of
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.recipe import MethodSpec, TrainSpec

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.pipeline.learn import Learner
    from keepset.stages.influence import InfluenceRequest
    from keepset.stages.job import Job
    from keepset.stages.shapley import InRun

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

    found += loss_work(job, methods)
    if users("error-norms"):
        norms = forward(job, "error norms under the base", users("error-norms"), job.rows, r"error norms \(base\)")
        found.append(norms)
    if users("answers"):
        answers = [answer_alone(r) for r in job.rows]
        found.append(forward(job, "losses of answers alone", users("answers"), answers, r"losses \(answers alone\)"))
    trained = ", ".join(m.label for m in methods if {"warmup", "gradients"} & set(METHODS[m.name].needs))
    if trained and not recipe.warmup.path:
        from keepset.stages.losses import warmup_rows

        sides = [job.sides[1][i] for i in warmup_rows(job)[0]]
        found.append(training(job, "warm-up", trained, sides, recipe.warmup, "train models/warmup"))
    if users("checkpoint-losses"):
        found.append(
            forward(job, "losses at the checkpoints", users("checkpoint-losses"), job.rows,
                    r"losses \(checkpoint-\d+\)", times=checkpoints(job))
        )  # fmt: skip
    found += gradient_work(job, methods)
    found += [in_run_work(job, run, some) for run, some in alike(methods, "in-run", in_run_request).items()]
    found += [retraining_work(job, some) for some in alike(methods, "retraining", same_trainings).values()]
    found += representation_work(job, methods)
    return found


def alike(
    methods: list[MethodSpec], need: str, request: Callable[[dict[str, Any]], Any]
) -> dict[tuple[Any, int | None], list[MethodSpec]]:
    """The methods with a need, by what they ask for and by their shots: those of one group share it."""
    found: dict[tuple[Any, int | None], list[MethodSpec]] = {}
    for m in methods:
        if need in METHODS[m.name].needs:
            found.setdefault((request(m.options), m.shots), []).append(m)
    return found


def same_trainings(options: dict[str, Any]) -> Any:
    """What Monte-Carlo Shapley values must have in common to share the sets that were trained on."""
    return replace(retraining_request(options), permutations=0, tolerance=0.0)


def names_of(methods: list[MethodSpec]) -> str:
    """Their labels."""
    return ", ".join(m.label for m in methods)


def aimed(job: Job, shots: int | None) -> Job:
    """The job as a method with so many `shots` sees it."""
    return job if shots is None else job.with_shots(shots)


def loss_work(job: Job, methods: list[MethodSpec]) -> list[Work]:
    """Sweeps of losses under base and reference: one for each token loss, whole, without ends of turns, or rejected."""
    from keepset.stages.losses import SubJob, of_loss

    found: list[Work] = []
    users = [m for m in methods if "losses" in METHODS[m.name].needs]
    reference = [m for m in users if "reference" in METHODS[m.name].needs]
    trained = reference_training(job, names_of(reference)) if reference else []
    for loss in dict.fromkeys(token_loss(m) for m in users):
        some, of = [m for m in users if token_loss(m) == loss], of_loss(loss)
        content = [m for m in some if m.options.get("end_of_turn") is False]
        whole = [m for m in some if m not in content]
        under = [m for m in whole if m in reference]
        sides = [m for m in whole if m.options.get("side", "chosen") != "chosen"]
        if whole:
            logged = rf"losses \(base( and reference)?{of}\)"
            found.append(forward(job, f"losses under the base{of}", names_of(whole), job.rows, logged))
        if under or content:
            found, trained = [*found, *trained], []
        if under:
            logged = rf"losses \(((base and )?reference|fold\d+){of}\)"
            found.append(forward(job, f"losses under the reference{of}", names_of(under), job.rows, logged))
        if content:
            rows = SubJob(job, np.arange(len(job.ids)), end_of_turn=False).rows
            logged = rf"losses \((base-content|(base-content and )?reference-content){of}\)"
            stage = f"losses without ends of turns{of}"
            found.append(forward(job, stage, names_of(content), rows, logged, times=2))
        if sides and job.rejected is not None:
            logged = rf"losses \((base-rejected|(base-rejected and )?reference-rejected){of}\)"
            stage = f"losses of the rejected sides{of}"
            found.append(forward(job, stage, names_of(sides), job.rejected, logged, times=2))
    return found


def token_loss(spec: MethodSpec) -> str:
    """Which loss of a token a method sums."""
    return str(spec.options.get("token_loss", "ce"))


def representation_work(job: Job, methods: list[MethodSpec]) -> list[Work]:
    """Hidden states or embeddings of the pool, and of each target that is aimed at."""
    found: list[Work] = []
    users = [m for m in methods if "representations" in METHODS[m.name].needs]
    for how in dict.fromkeys(pooling(m) for m in users if not m.options.get("embedding_model")):
        some = [m for m in users if not m.options.get("embedding_model") and pooling(m) == how]
        logged = rf"representations \({how}\)"
        found.append(forward(job, f"representations ({how})", names_of(some), job.rows, logged, head=False))
        for shots in dict.fromkeys(m.shots for m in some):
            of, who = aimed(job, shots), names_of([m for m in some if m.shots == shots])
            stage = f"target representations ({how}{of.aim})"
            chosen = [pair[0] for pair in of.target_pairs[0]]
            found.append(forward(job, stage, who, chosen, re.escape(stage), head=False))
    for name in dict.fromkeys(str(m.options["embedding_model"]) for m in users if m.options.get("embedding_model")):
        from keepset.features.embeddings import TextEncoder

        some, encoder = [m for m in users if m.options.get("embedding_model") == name], TextEncoder(name, device="meta")

        def embedded(stage: str, who: str, texts: list[str], encoder: TextEncoder = encoder) -> Work:
            return Work(stage, who, "forward", len(texts), *encoder.cost(texts), re.escape(stage))

        found.append(embedded(f"embeddings ({name})", names_of(some), job.texts()))
        for shots in dict.fromkeys(m.shots for m in some):
            of, who = aimed(job, shots), names_of([m for m in some if m.shots == shots])
            found.append(embedded(f"target embeddings ({name}{of.aim})", who, of.target_texts(with_chosen=True)))
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
    """Forward-equivalents of a gradient pass over the pool; a pair's weight in its loss takes policy and reference."""
    return target_passes(job) + (2.0 if pair_gradients(job) else 0.0)


def target_passes(job: Job) -> float:
    """Forward-equivalents of plain gradients: the backward part ends below the lowest layer that is looked at."""
    depth, layers = job.recipe.gradients.last_layers, job.loaded.model.config.get_text_config().num_hidden_layers
    return 2.0 if depth is None else 1.0 + min(1.0, depth / layers)


def answer_alone(row: Encoded, start: int = 0) -> Encoded:
    """A row's supervised tokens after the single token `start`, all of them supervised."""
    from keepset.model.encode import Encoded

    ids = np.concatenate([[start], row.input_ids[row.supervised]]).astype(np.int32)
    return Encoded(ids, np.arange(len(ids)) > 0, row.truncated)


def checkpoints(job: Job) -> int:
    """How many warm-up checkpoints the scores use."""
    from keepset.train.warmup import list_checkpoints

    spec = job.recipe.warmup
    if spec.checkpoints == "last":
        return 1
    return len(list_checkpoints(Path(spec.path))) if spec.path else int(np.ceil(spec.num_train_epochs))


def pooling(spec: MethodSpec) -> str:
    """How a representation method pools: its option, or its default."""
    return (
        "weighted_mean"
        if spec.name == "rds+"
        else str(spec.options.get("pooling", options_of(spec.name)["pooling"][1]))
    )


def reference_training(job: Job, methods: str) -> list[Work]:
    """Training the reference, or one for each fold; none where it is from elsewhere."""
    spec, found = job.recipe.reference, []
    if spec.folds >= 2:
        from keepset.methods.cross_fit import fold_of

        fold = fold_of(job.ids, spec.folds)
        for k in range(spec.folds):
            rows = [r for r, f in zip(job.sides[1], fold, strict=True) if f != k]
            stage = f"train reference {k + 1} of {spec.folds}"
            found.append(training(job, stage, methods, rows, spec, f"train models/reference-fold{k}"))
    elif not spec.path:
        found.append(training(job, "train the reference", methods, job.sides[1], spec, "train models/reference"))
    return found


def gradient_work(job: Job, methods: list[MethodSpec]) -> list[Work]:
    """Passes over the pool, one for each map, checkpoint and target aimed at; the targets' gradients and solves."""
    found: list[Work] = []
    users = [m for m in methods if "gradients" in METHODS[m.name].needs]
    stored: set[str] = set()  # maps whose rows are in the store: later targets only read them
    for shots in dict.fromkeys(m.shots for m in users):
        of = aimed(job, shots)
        requests = {m.label: influence_request(m.name, m.options) for m in users if m.shots == shots}
        for map_ in dict.fromkeys(r.map for r in requests.values()):
            some = {label: r for label, r in requests.items() if r.map == map_}
            if map_ not in stored:
                found.append(pass_work(of, map_, some))
            if job.recipe.gradients.store:
                stored.add(map_)
                found += [sample_work(of, label, r) for label, r in some.items()]
        found += target_work(of, requests)
    return found


def last_alone(request: InfluenceRequest) -> bool:
    """Whether a request looks at the last checkpoint alone: influence functions."""
    return request.curvature is not None


def pass_work(job: Job, map_: str, requests: dict[str, InfluenceRequest]) -> Work:
    """Gradients of the pool's rows under one map, at every checkpoint that a request looks at."""
    many = 1 if all(last_alone(r) for r in requests.values()) else checkpoints(job)
    logged = rf"gradients at \S+ \({map_}{job.aim}\)"
    rows = [side for row in gradient_rows(job) for side in row]
    stage = f"gradients ({map_}{job.aim}) x{many}"
    return backward(job, stage, ", ".join(requests), rows, logged, passes=gradient_passes(job), times=many)


def sample_work(job: Job, label: str, request: InfluenceRequest) -> Work:
    """The rows that a store's estimates are held against."""
    from keepset.stages.stored import sample_of

    rows, many = gradient_rows(job), 1 if last_alone(request) else checkpoints(job)
    some = [rows[i][0] for i in sample_of(len(rows), job.recipe.gradients.store_sample)]
    stage, logged = f"sample of the store ({label})", rf"sample of gradients at \S+ \({request.map}{job.aim}\)"
    return backward(job, stage, label, some, logged, passes=gradient_passes(job), times=many)


def target_work(job: Job, requests: dict[str, InfluenceRequest]) -> list[Work]:
    """The target's gradients for every distinct request, whatever the map, and the solves of influence functions."""
    from keepset.stages.influence import curvature_cost, curvature_rows, target_cost, target_rows

    found: list[Work] = []
    plain = {label: replace(r, curvature=None, map="sgd") for label, r in requests.items()}
    for request in dict.fromkeys(plain.values()):
        labels = [label for label, r in plain.items() if r == request]
        many = 1 if all(last_alone(requests[label]) for label in labels) else checkpoints(job)
        tokens, work = target_cost(job, request)
        how = f"{request.loss}, a {request.normalise}{job.aim}"
        if (request.loss, request.normalise) == ("dpo", "task"):
            how += f", beta {request.beta:g}, reference {request.reference}"
        found.append(
            Work(
                f"target gradients ({how}) x{many}", ", ".join(labels), "backward",
                len(target_rows(job, request)), tokens * many, work * many,
                rf"target gradients at \S+ \({request.loss}{job.aim}\)",
            )
        )  # fmt: skip
    for curved in dict.fromkeys(r.curvature for r in requests.values() if r.curvature is not None):
        labels = [label for label, r in requests.items() if r.curvature == curved]
        logged = rf"curvature at \S+ \({curved.solver}{job.aim}\)"
        rows = len(curvature_rows(job, curved))
        found.append(
            Work(f"curvature ({curved.solver}{job.aim})", ", ".join(labels), "backward", rows,
                 *curvature_cost(job, curved), logged)
        )  # fmt: skip
    return found


def in_run_work(job: Job, wanted: tuple[InRun, int | None], methods: list[MethodSpec]) -> Work:
    """The SGD run of in-run Shapley: every batch, the target's gradients at every step, its loss before and after."""
    from keepset.stages.shapley import in_run_batches, in_run_cost

    run, of = wanted[0], aimed(job, wanted[1])
    batches = [[job.rows[i] for i in batch] for batch in in_run_batches(job.ids, run)]
    costs = [in_run_cost(of, batch, run.second_order) for batch in batches]
    target = forward(of, "", "", [chosen for chosen, _ in of.target_pairs[0]], times=2)
    tokens, work = sum(t for t, _ in costs) + target.tokens, sum(f for _, f in costs) + target.flops
    rows, logged = sum(len(b) for b in batches), re.escape(f"in-run Shapley{of.aim}")
    stage = f"in-run Shapley{of.aim}, {len(batches)} steps"
    return Work(stage, names_of(methods), "backward", rows, tokens, work, logged)


def retraining_work(job: Job, methods: list[MethodSpec]) -> Work:
    """The trainings of Monte-Carlo Shapley, each set of players once, none cut short by the tolerance."""
    from keepset.stages.shapley import players_of, retraining_cost, retraining_sets

    of, runs = aimed(job, methods[0].shots), [retraining_request(m.options) for m in methods]
    players = players_of(job, runs[0])
    wanted = set[frozenset[int]]().union(*(retraining_sets(len(players), run) for run in runs))
    sets = [[job.rows[i] for p in some for i in players[p][1]] for some in wanted]
    costs = [retraining_cost(of, rows) for rows in sets]
    tokens, work = sum(t for t, _ in costs), sum(f for _, f in costs)
    rows, logged = sum(len(s) for s in sets), rf"retraining \(Shapley{of.aim}\)"
    stage = f"train {len(sets)} models (Shapley{of.aim})"
    return Work(stage, names_of(methods), "train", rows, tokens, work, logged)


def final_work(job: Job) -> list[Work]:
    """Training and evaluating a model for every subset and seed; rows of middle length stand for the unknown choice."""
    from keepset.pipeline.learn import Learner, direct_args

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
    from keepset.pipeline.reference_check import rows_to_check

    labels, rows = rows_to_check(job, learner)
    logged = r"losses \(heldout-(base|reference)( and heldout-reference)?\)"
    return [forward(job, "reference on held-out rows", ", ".join(labels), rows, logged, times=2)] if rows else []
