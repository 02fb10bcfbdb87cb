"""The models that subsets are judged by: train from the base on each subset, evaluate each on the held-out sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays

from keepset.data import Pool, Target, load_pool, load_target
from keepset.evaluate.heldout import Heldout, heldout_losses, heldout_table
from keepset.evaluate.preference import (
    PairLogps,
    correct,
    length_matched,
    margins,
    pair_logps,
    preference_loss,
    preference_table,
)
from keepset.lazy import pick
from keepset.model.adapters import attached
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.pipeline.choose import Subset
from keepset.pipeline.metrics import BY_TASK, HELD_OUT
from keepset.recipe import TrainSpec
from keepset.row_ids import id_order
from keepset.runfolder import layout
from keepset.runfolder.files import digest, file_digest, write_atomic
from keepset.runfolder.records import Items, Point, read_json
from keepset.stages.encoded import encode_pairs, encode_pool
from keepset.stages.stage import VERSION

if TYPE_CHECKING:
    from keepset.model.encode import Encoded, Encoder
    from keepset.model.load import Loaded
    from keepset.stages.job import Job


class Learner:
    """The model that is trained on the subsets: the scoring model, or another one (transfer)."""

    def __init__(self, job: Job) -> None:
        """Take the recipe's `train_model`, else its `model`."""
        self.job = job
        self.spec = job.recipe.train_model or job.recipe.model
        self.transfer = job.recipe.train_model is not None
        self.holder = job if not self.transfer else copy(job)  # of the model in memory
        if self.transfer:
            self.holder.recipe, self.holder.held = job.recipe.model_copy(update={"model": self.spec}), {}
            self.holder.__dict__.pop("fingerprint", None)

    @property
    def loaded(self) -> Loaded:
        """The untrained model; loaded again where it was released."""
        return self.holder.loaded

    @cached_property
    def encoder(self) -> Encoder:
        """Its tokenizer and template."""
        return self.loaded.encoder if self.transfer else self.job.encoder

    def sides(self, indices: np.ndarray, name: str) -> Sequence[tuple[Encoded, ...] | None]:
        """The sides of the job's rows as this model's tokens; None, and said under `name`, where it refuses one."""
        if not self.transfer:
            return pick(self.job.sides[1], indices)
        rows, refused = encode_pool(self.job.pool.take(self.job.usable[indices]), self.encoder)
        if refused:
            self.job.say(f"{name}: {len(refused)} rows left out by the other model's template: {refused[0][1]}")
        return rows

    def rows(self, subset: Subset) -> list[tuple[Encoded, ...]]:
        """The sides of the subset's rows, by id, without those that this model's template refuses."""
        sides = self.sides(subset.indices[id_order(subset.ids(self.job))], subset.name)
        return [row for row in sides if row is not None]

    @cached_property
    def target_sides(self) -> tuple[list[tuple[Encoded, Encoded | None]], np.ndarray]:
        """The target's rows as this model's tokens, chosen and rejected (or None), and their tasks."""
        pairs, kept = (
            encode_pairs(self.job.target, self.encoder, self.job.say) if self.transfer else self.job.target_pairs
        )
        return pairs, np.asarray(self.job.target.tasks, dtype=str)[kept]

    @cached_property
    def target_pairs(self) -> list[tuple[Encoded, ...]]:
        """The target's pairs as this model's tokens."""
        return [(chosen, rejected) for chosen, rejected in self.target_sides[0] if rejected is not None]

    @cached_property
    def eval_pairs(self) -> tuple[list[tuple[Encoded, Encoded]], np.ndarray, Target] | None:
        """Held-out pairs as tokens, their tasks, and the set; None if the recipe names none."""
        specs = self.job.recipe.evaluate.pairs
        if not specs:
            return None
        target = load_target(specs, seed=self.job.recipe.seed, strict=self.job.recipe.strict)
        pairs, kept = encode_pairs(target, self.encoder, self.job.say)
        whole = [i for i, (_, rejected) in enumerate(pairs) if rejected is not None]
        self.job.say(
            f"evaluation pairs: {len(target) + len(target.quarantine)} in = {len(whole)} used + "
            f"{len(target) + len(target.quarantine) - len(whole)} quarantined"
        )
        return [pairs[i] for i in whole], np.asarray(target.tasks, dtype=str)[kept[whole]], target  # type: ignore[misc]

    @cached_property
    def eval_rows(self) -> tuple[list[Encoded], np.ndarray, Pool] | None:
        """Held-out SFT rows as tokens, their sources, and the pool; None if the recipe names none."""
        from keepset.model.encode import encode_all, what_is_lost

        specs = self.job.recipe.evaluate.heldout
        if not specs:
            return None
        pool = load_pool(specs, strict=self.job.recipe.strict)
        rows, refused = encode_all(self.encoder, (pool.messages(i) for i in range(len(pool))))
        usable = [i for i, row in enumerate(rows) if row is not None]
        self.job.say(
            f"held-out rows: {len(pool) + len(pool.quarantine)} in = {len(usable)} used + "
            f"{len(refused) + len(pool.quarantine)} quarantined"
        )
        for line in what_is_lost(row for row in rows if row is not None):
            self.job.say(f"held-out rows: {line}")
        return [rows[i] for i in usable], np.asarray(pool.sources(), dtype=str)[usable], pool  # type: ignore[misc]


def direct_args(job: Job) -> TrainSpec:
    """How the target's pairs are trained on: `train`, with DPO where that says SFT."""
    args = job.recipe.train
    return args.model_copy(update={"loss": "dpo"}) if args.loss == "sft" else args


def final_key(job: Job, learner: Learner, subset: Subset, seed: int) -> dict[str, Any]:
    """Everything that a final model depends on."""
    direct = subset.kind == "dpo-direct"
    args = direct_args(job) if direct else job.recipe.train
    return {
        "version": VERSION, "model": learner.holder.fingerprint, "encoder": learner.encoder.fingerprint,
        "lora": None if args.full else job.recipe.lora.model_dump(), "args": args.key(),
        "ids": job.target.fingerprint() if direct else digest(sorted(str(i) for i in subset.ids(job))), "seed": seed,
        **({"each_epoch": True} if job.recipe.evaluate.each_epoch else {}),
    }  # fmt: skip


def train_final(job: Job, learner: Learner, subset: Subset, seed: int) -> dict[str, Any]:
    """Train the base on a subset, unless that was done with the same rows, arguments and seed."""
    from keepset.train.fit import fit

    direct = subset.kind == "dpo-direct"
    args, rows = (direct_args(job), learner.target_pairs) if direct else (job.recipe.train, learner.rows(subset))
    folder = layout.model(subset.name, seed)

    def work(path: Path) -> dict[str, Any]:
        n_tokens, n_head = count_tokens(trained_sides(rows, args))
        epochs = args.num_train_epochs
        job.say(f"training {subset.name} (seed {seed}): {len(rows)} rows, {n_tokens} tokens, {epochs:g} epochs")
        with job.run.timed(f"train {folder}", rows=len(rows)) as spent:
            work = flops(learner.loaded.model, n_tokens, n_head, passes=3 if args.full else 2) * epochs
            job.release()
            learner.holder.release()
            result = fit(
                learner.spec, job.recipe.lora, rows, path, args, seed=seed, moments=job.recipe.evaluate.each_epoch,
                console=job.console,
            )  # fmt: skip
            spent.update(tokens=int(n_tokens * epochs), flops=work)
        return {"seconds": result.seconds, "steps": result.steps, "rows": len(rows), "tokens": n_tokens}

    return job.run.step(folder, final_key(job, learner, subset, seed), work)


def in_order(data: Pool | Target, group: str) -> str:
    """Name held-out data by the rows in their order, which the items are paired by, and the groups they count in."""
    return digest([data.table["id"].to_pylist(), data.table[group].to_pylist()])


def evaluation_key(job: Job, learner: Learner, weights: Path | None) -> dict[str, Any]:
    """Everything that a model's held-out items and their summary depend on; weights None: the untrained base."""
    pairs, rows, spec = learner.eval_pairs, learner.eval_rows, job.recipe.evaluate
    looks_on = {"pairs", "heldout", "each_epoch", "headline"}
    return {
        "version": VERSION, "model": learner.holder.fingerprint, "encoder": learner.encoder.fingerprint,
        "weights": [] if weights is None else [file_digest(p) for p in sorted(weights.glob("*.safetensors"))],
        "pairs": in_order(pairs[2], "task") if pairs else None, "rows": in_order(rows[2], "source") if rows else None,
        "gsm8k": in_order(load_pool(spec.gsm8k), "source") if spec.gsm8k else None,
        "columns": "by task", "spec": spec.model_dump(mode="json", exclude=looks_on),
    }  # fmt: skip


def evaluate_final(
    job: Job, learner: Learner, name: str, seed: int | None, base: Items | None
) -> tuple[dict[str, Any], Items]:
    """Evaluate a trained model (or the untrained base: seed None), unless that was done.

    Returns the summary (tables with intervals, as `summary.json` has them), and the items.
    """
    weights = None if seed is None else job.run.path / layout.model(name, seed)
    folder = layout.evaluation(name, seed)
    if seed is not None:
        job.run.require_whole(layout.model(name, seed))
    key = evaluation_key(job, learner, weights)

    def work(path: Path) -> dict[str, Any]:
        with job.run.timed(f"evaluate {name if seed is None else layout.seeded(name, seed)}"):
            items, gsm8k = measure(job, learner, weights)
        write_atomic(path / layout.ITEMS, save_arrays(items.to_arrays()))
        summary = summarise(job, learner, items, base)
        if gsm8k is not None and items.gsm8k is not None:  # the answers' texts apart: they are most of the bytes
            answers = zip(items.gsm8k, gsm8k.pop("answers"), strict=True)
            job.run.save_json(
                f"{folder}/{layout.GSM8K_ANSWERS}", [{"correct": bool(c), "answer": a} for c, a in answers]
            )
            summary["gsm8k"] = gsm8k
        job.run.save_json(f"{folder}/{layout.SUMMARY}", summary)
        return {}

    job.run.step(folder, key, work)
    return job.run.load_json(f"{folder}/{layout.SUMMARY}"), load_items(job.run.path / folder)


def load_items(folder: Path) -> Items:
    """The items of an evaluation's folder."""
    return Items.from_arrays(load_file(str(folder / layout.ITEMS)))


def evaluate_epochs(job: Job, learner: Learner, name: str, seed: int, base: Items | None, final: Items) -> None:
    """Evaluate a trained model at each epoch's end into `epochs/<name>-seed<k>`; the last one is the final model."""
    model = job.run.path / layout.model(name, seed)
    checkpoints = sorted(model.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    share = job.recipe.evaluate.length_match
    arrays = [array.tobytes() for _, array in sorted(final.to_arrays().items())]
    key = {"version": VERSION, "weights": [file_digest(p / "adapter_model.safetensors") for p in checkpoints],
           "final": digest([digest(array) for array in arrays]), "match": share}  # fmt: skip
    folder = layout.epochs(name, seed)

    def work(path: Path) -> dict[str, Any]:
        points: list[Point] = []
        for k, checkpoint in enumerate(checkpoints, start=1):
            with job.run.timed(f"evaluate {layout.seeded(name, seed)} after epoch {k}"):
                items = final if checkpoint == checkpoints[-1] else measure(job, learner, checkpoint)[0]
            means = {m: float(np.mean(v)) for m, v in item_metrics(items, base, share).items()}
            points.append(Point(layout.seeded(name, seed), k, means))
        job.run.save_json(f"{folder}/{layout.POINTS}", [point.to_json() for point in points])
        return {}

    job.run.step(folder, key, work)


def epoch_points(job: Job) -> list[Point]:
    """What `evaluate_epochs` has measured, all models together."""
    files = sorted((job.run.path / layout.EPOCHS_FOLDER).glob(f"*/{layout.POINTS}"))
    names = [str(file.relative_to(job.run.path)) for file in files]
    return [p for name in names for p in read_json(tuple[Point, ...], job.run.load_json(name), name)]


def measure(job: Job, learner: Learner, weights: Path | None) -> tuple[Items, dict[str, Any] | None]:
    """Run one model over the held-out sets."""
    with trained_model(learner, weights) as model:
        return measure_model(job, learner, model)


@contextmanager
def trained_model(learner: Learner, weights: Path | None) -> Iterator[Any]:
    """The model of a folder, an adapter or whole; None: the untrained base."""
    if weights is None:
        yield learner.loaded.model
    elif (weights / "adapter_config.json").exists():
        with attached(learner.loaded.model, weights) as model:
            yield model
    else:
        with learner.holder.instead(learner.spec.model_copy(update={"model_name_or_path": str(weights)})) as trained:
            yield trained.model


def measure_model(job: Job, learner: Learner, model: Any) -> tuple[Items, dict[str, Any] | None]:
    """Log-probabilities of the held-out pairs, losses of the held-out rows; GSM8K's answers and figures beside them."""
    pairs, tasks, rows, sources = {}, {}, {}, {}
    budget = job.recipe.batching.token_budget
    if learner.eval_pairs:
        logps = pair_logps(model, learner.eval_pairs[0], token_budget=budget)
        pairs, tasks = {k: np.asarray(v) for k, v in vars(logps).items()}, members(learner.eval_pairs[1])
    if learner.eval_rows:
        heldout = heldout_losses(model, learner.eval_rows[0], token_budget=budget)
        rows, sources = {"nll": heldout.nll, "n_tokens": heldout.n_tokens}, members(learner.eval_rows[1])
    gsm8k, right = None, None
    if job.recipe.evaluate.gsm8k:
        from keepset.evaluate.gsm8k import evaluate_gsm8k

        gsm8k = evaluate_gsm8k(
            model, learner.encoder, job.recipe.evaluate.gsm8k,
            limit=job.recipe.evaluate.gsm8k_limit, max_new_tokens=job.recipe.evaluate.max_new_tokens,
        )  # fmt: skip
        right = np.asarray(gsm8k.pop("correct"), dtype=np.float64)
    return Items(pairs, tasks, rows, sources, right), gsm8k


def members(names: np.ndarray) -> dict[str, np.ndarray]:
    """For each of several tasks or sources (n,) 1 for its items, else 0; empty where there is but one."""
    several = np.unique(names)
    return {str(name): (names == name).astype(np.float64) for name in several} if len(several) > 1 else {}


def logps_of(items: Items) -> PairLogps:
    """The pairs' log-probabilities."""
    return PairLogps(**items.pairs)


def summarise(job: Job, learner: Learner, items: Items, base: Items | None) -> dict[str, Any]:
    """Tables with intervals, from the items."""
    spec = job.recipe.evaluate
    summary: dict[str, Any] = {}
    if learner.eval_pairs:
        summary["preference"] = preference_table(
            logps_of(items), logps_of(base) if base else None, learner.eval_pairs[1],
            length_match=spec.length_match, resamples=spec.bootstrap, seed=job.recipe.seed,
        )  # fmt: skip
    if learner.eval_rows:
        summary["heldout"] = heldout_table(
            Heldout(**items.rows), learner.eval_rows[1],
            resamples=spec.bootstrap, seed=job.recipe.seed,
        )  # fmt: skip
    return summary


def item_metrics(items: Items, base: Items | None, share: float) -> dict[str, np.ndarray]:
    """Per-item numbers that comparisons average: larger is better for accuracies and margins, smaller for losses."""
    metrics: dict[str, np.ndarray] = {}
    if items.pairs:
        logps = logps_of(items)
        matched = length_matched(logps.n_chosen, logps.n_rejected, share)
        for form, margin in margins(logps, logps_of(base) if base else None).items():
            metrics[f"accuracy.{form}"] = correct(margin)
            metrics[f"margin.{form}"] = margin
            if matched.any():
                metrics[f"accuracy.{form}.matched"] = correct(margin[matched])
                metrics[f"margin.{form}.matched"] = margin[matched]
        metrics["loss.chosen"] = -logps.chosen / logps.n_chosen
        metrics["loss.rejected"] = -logps.rejected / logps.n_rejected
        if base is not None:
            metrics["loss.preference"] = preference_loss(logps, logps_of(base))
        for task, member in items.tasks.items():
            for metric in BY_TASK:
                metrics[f"{metric}.of.{task}"] = metrics[metric][member > 0]
    if items.rows:
        metrics[HELD_OUT] = items.rows["nll"] / items.rows["n_tokens"]
        for source, member in items.sources.items():
            metrics[f"{HELD_OUT}.{source}"] = metrics[HELD_OUT][member > 0]
    if items.gsm8k is not None:
        metrics["gsm8k.accuracy"] = items.gsm8k
    return metrics
