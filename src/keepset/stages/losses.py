"""The resumable model stages of a run: rows become arrays, shard by shard, and what it cost is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import RecipeError
from keepset.methods.cross_fit import fold_of
from keepset.model.adapters import attached
from keepset.model.encode import content_only
from keepset.model.flops import count_tokens, flops, trained_sides
from keepset.model.weights import config_digests, fingerprint, weight_files
from keepset.recipe import TrainSpec
from keepset.runfolder import layout
from keepset.runfolder.files import digest, file_digest
from keepset.runfolder.shards import Arrays
from keepset.stages.counts import answer_alone
from keepset.stages.kept_tokens import keep_tokens

if TYPE_CHECKING:
    from keepset.features.losses import TokenLoss
    from keepset.features.representations import Pooling
    from keepset.model.encode import Encoded
    from keepset.stages.job import Job
    from keepset.train.fit import Sides
    from keepset.train.warmup import Checkpoint

VERSION = 1  # of the numbers: raise it when a change of code changes them


def sweep_rows(
    job: Job,
    stages: dict[str, dict[str, Any]],
    what: str,
    batch: Callable[[list[Any], list[str]], dict[str, Arrays]],
    *,
    rows: Sequence[Encoded | Sides] | None = None,
    passes: float = 1,
    each: bool = False,
    head: bool = True,
) -> dict[str, Arrays]:
    """Compute what is missing of some stages, shard by shard, on the job's progress bar and in its costs.

    Args:
        job: the job; its ids name the rows.
        stages: stage name -> everything it depends on.
        what: the name in `costs.jsonl` and on screen.
        batch: gets a shard's rows and the names of its missing stages; returns each one's arrays.
        rows: the tokens of the job's rows, or of their sides; default: `job.rows`.
        passes: forward-equivalents that a shard costs (see `cost.flops`).
        each: whether every missing stage costs them, rather than all together.
        head: whether the output head runs.

    Returns:
        Stage name -> arrays of all rows.
    """
    rows = job.rows if rows is None else rows

    def compute(indices: np.ndarray, missing: list[str]) -> dict[str, Arrays]:
        return batch([rows[i] for i in indices], missing)

    def count(indices: np.ndarray, missing: list[str]) -> None:
        some = [rows[i] for i in indices]
        n_tokens, n_head = count_tokens([side for row in some for side in (row if isinstance(row, tuple) else (row,))])
        times = len(missing) if each else 1
        spent["rows"] += len(indices)
        spent["tokens"] += n_tokens * times
        spent["flops"] += flops(job.loaded.model, n_tokens, n_head if head else 0, passes=passes * times)

    with job.run.timed(what) as spent, job.tracked(what, len(rows)) as advance:
        spent.update(tokens=0, flops=0.0, rows=0)
        out = job.run.sweep(
            stages, job.ids, compute, shard_rows=job.recipe.batching.shard_rows, workers=workers_for(job), spent=count,
            advance=advance,
        )  # fmt: skip
        spent["skip"] = spent["tokens"] == 0
    return out


def workers_for(job: Job) -> int:
    """Processes that score: the recipe's `batching.workers`.

    Raises:
        RecipeError: several, and the model is on a GPU, which forks can't share.
    """
    workers = job.recipe.batching.workers
    if workers > 1 and job.loaded.model.device.type != "cpu":
        raise RecipeError(f"batching.workers: {workers} processes score on the CPU only; leave it at 1 on a GPU")
    return workers


# -- losses -----------------------------------------------------------------------------------------------------


def base_losses(job: Job, *, token_loss: TokenLoss = "ce") -> Arrays:
    """Summed NLL in nats (`nll`, (n,) float64) and supervised tokens (`n_tokens`, (n,)) under the base."""
    return loss_sweep(job, {"losses-base": base_key(job, token_loss)}, None, token_loss)["losses-base"]


def base_key(job: Job, token_loss: TokenLoss) -> dict[str, Any]:
    """Everything a base loss depends on, and whether its tokens are kept."""
    kept = {"tokens": True} if job.recipe.batching.keep_token_losses else {}
    return {"version": VERSION, **job.data_key(), "token_loss": token_loss, **kept}


def reference_losses(job: Job, *, token_loss: TokenLoss = "ce", end_of_turn: bool = True) -> tuple[Arrays, Arrays]:
    """Losses under the base and under the reference model, in one sweep where the reference is an adapter.

    With `reference.folds` each row is scored by the reference that was not trained on it. Without `end_of_turn` the
    tokens that end a turn are left out of both.

    Raises:
        RecipeError: no `end_of_turn`, and the reference is cross-fitted.
    """
    if not end_of_turn:
        if job.recipe.reference.folds >= 2:
            raise RecipeError("reference.folds: cross-fitted losses count the end of turn; drop `end_of_turn: false`")
        return under_both(job, SubJob(job, np.arange(len(job.ids)), end_of_turn=False), token_loss, "-content")
    if job.recipe.reference.folds >= 2:
        return base_losses(job, token_loss=token_loss), crossfit_losses(job, token_loss)
    return under_both(job, job, token_loss, "")


def rejected_losses(job: Job, *, token_loss: TokenLoss = "ce") -> tuple[Arrays, Arrays]:
    """`reference_losses` of the rejected sides of a pool of pairs.

    Raises:
        RecipeError: the pool has none, or the reference is cross-fitted.
    """
    if not job.pool.has_pairs:
        raise RecipeError("side: the rejected sides are scored for a pool of pairs only; set `pairs: true` on it")
    if job.recipe.reference.folds >= 2:
        raise RecipeError("reference.folds: cross-fitting scores the chosen sides only; use `side: chosen`")
    return under_both(job, SubJob(job, np.arange(len(job.ids)), side=1), token_loss, "-rejected")


def under_both(job: Job, seen: Any, token_loss: TokenLoss, suffix: str) -> tuple[Arrays, Arrays]:
    """Losses of the rows of `seen` (the job, or one side of it) under base and reference."""
    base, base_name, name = base_key(job, token_loss), f"losses-base{suffix}", f"losses-reference{suffix}"
    adapter, fingerprint, full = reference_model(job)
    key = {**base, "reference": fingerprint}
    if full:
        found = loss_sweep(seen, {base_name: base}, None, token_loss)[base_name]
        return found, full_reference_losses(seen, adapter, {name: key}, token_loss)[name]
    out = loss_sweep(seen, {base_name: base, name: key}, adapter, token_loss)
    return out[base_name], out[name]


def loss_sweep(
    job: Job, stages: dict[str, dict[str, Any]], adapter: Path | None, token_loss: TokenLoss
) -> dict[str, Arrays]:
    """One pass over the rows under the base and / or one adapter, whichever is missing on disk."""
    from keepset.features.losses import row_losses

    budget, keep = job.recipe.batching.token_budget, job.recipe.batching.keep_token_losses
    names_of = {id(row): str(row_id) for row, row_id in zip(job.rows, job.ids, strict=True)} if keep else {}

    def batch(some: list[Encoded], missing: list[str]) -> dict[str, Arrays]:
        adapters = tuple("-base" not in name for name in missing) if adapter is not None else (False,)
        found = row_losses(model, some, token_budget=budget, adapters=adapters, token_loss=token_loss, per_token=keep)
        for name, tokens in zip(missing, found.token_nll or [], strict=False):
            keep_tokens(job.run.stage_folder(name, stages[name]), [names_of[id(row)] for row in some], tokens)
        return {name: {"nll": found.nll[k], "n_tokens": found.n_tokens} for k, name in enumerate(missing)}

    names = " and ".join(name.removeprefix("losses-") for name in stages) + of_loss(token_loss)
    with attached(job.loaded.model, adapter) if adapter is not None else nullcontext(job.loaded.model) as model:
        what = "error norms" if token_loss == "error-norm" else "losses"
        return sweep_rows(job, stages, f"{what} ({names})", batch, each=True)


def of_loss(token_loss: str) -> str:
    """How a sweep of another loss than the cross-entropy is told apart in `costs.jsonl`."""
    return "" if token_loss in ("ce", "error-norm") else f", {token_loss}"


def answer_losses(job: Job) -> Arrays:
    """Losses of the answers alone under the base: the supervised tokens after a single BOS (or EOS) token."""
    from keepset.features.losses import row_losses

    tokenizer = job.loaded.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    budget = job.recipe.batching.token_budget

    def batch(some: list[Encoded], missing: list[str]) -> dict[str, Arrays]:
        found = row_losses(job.loaded.model, some, token_budget=budget, adapters=(False,))
        return {"losses-alone": {"nll": found.nll[0], "n_tokens": found.n_tokens}}

    stages = {"losses-alone": {"version": VERSION, **job.data_key()}}
    rows = [answer_alone(row, start) for row in job.rows]
    return sweep_rows(job, stages, "losses (answers alone)", batch, rows=rows)["losses-alone"]


def checkpoint_losses(job: Job) -> np.ndarray:
    """Mean losses (c + 1, n), nats a token, under the base and every warm-up checkpoint, in order of time."""
    found = [base_losses(job)]
    for checkpoint in warmup_checkpoints(job):
        name = f"losses-{checkpoint.path.name}"
        key = {**base_key(job, "ce"), "checkpoint": digest(weights_of(checkpoint.path))}
        found.append(loss_sweep(job, {name: key}, checkpoint.path, "ce")[name])
    return np.stack([f["nll"] / f["n_tokens"] for f in found])


def full_reference_losses(
    job: Job, path: Path, stages: dict[str, dict[str, Any]], token_loss: TokenLoss
) -> dict[str, Arrays]:
    """Losses under a fully fine-tuned reference, which takes the base's place in memory."""
    from keepset.features.losses import row_losses

    ((name, key),) = stages.items()
    shard_rows = job.recipe.batching.shard_rows
    if job.run.complete(name, key, job.ids, shard_rows):
        return job.run.sweep(stages, job.ids, lambda i, m: {}, shard_rows=shard_rows)
    budget = job.recipe.batching.token_budget

    def batch(some: list[Encoded], missing: list[str]) -> dict[str, Arrays]:
        found = row_losses(other.model, some, token_budget=budget, adapters=(True,), token_loss=token_loss)
        return {name: {"nll": found.nll[0], "n_tokens": found.n_tokens}}

    with job.instead(job.recipe.model.model_copy(update={"model_name_or_path": str(path)})) as other:
        return sweep_rows(job, stages, f"losses ({name.removeprefix('losses-')}{of_loss(token_loss)})", batch)


# -- trained helpers: reference and warm-up -------------------------------------------------------------------------


def train_key(job: Job, args: TrainSpec, ids: np.ndarray, seed: int) -> dict[str, Any]:
    """Everything a training run depends on."""
    return {
        "version": VERSION,
        "model": job.fingerprint,
        "encoder": job.encoder.fingerprint,
        "lora": None if args.full else job.recipe.lora.model_dump(),
        "args": args.key(),
        "ids": digest(sorted(str(i) for i in ids)),
        "seed": seed,
    }


def id_order(ids: np.ndarray) -> np.ndarray:
    """Indices that sort ids."""
    return np.argsort(ids.astype(str), kind="stable")


def train_rows(
    job: Job, folder: str, sides: list[Sides], ids: np.ndarray, args: TrainSpec, seed: int
) -> dict[str, Any]:
    """Fine-tune the base on some rows into `folder`, unless that was done; returns its facts (seconds, tokens ...).

    The rows are put in the order of their ids, so that the order of the pool's files doesn't change the weights.
    """
    sides = [sides[i] for i in id_order(ids)]
    from keepset.train.fit import fit

    rows = trained_sides(sides, args)

    def work(path: Path) -> dict[str, Any]:
        n_tokens, n_head = count_tokens(rows)
        passes = 3 if args.full else 2
        with job.run.timed(f"train {folder}", rows=len(rows)) as spent:
            job.say(f"training {folder}: {len(sides)} rows, {n_tokens} tokens, {args.num_train_epochs:g} epochs")
            work = flops(job.loaded.model, n_tokens, n_head, passes=passes) * args.num_train_epochs
            job.release()
            result = fit(job.recipe.model, job.recipe.lora, sides, path, args, seed=seed, console=job.console)
            spent.update(tokens=int(n_tokens * args.num_train_epochs), flops=work)
        return {"seconds": result.seconds, "steps": result.steps, "rows": len(sides), "tokens": n_tokens,
                "losses": result.losses}  # fmt: skip

    return job.run.step(folder, train_key(job, args, ids, seed), work)


def reference_model(job: Job) -> tuple[Path, str, bool]:
    """DavIR's reference: its folder, its fingerprint, and whether it is a full model rather than an adapter.

    Raises:
        ModelError: an existing one that reads other tokens than the scored model.
    """
    from keepset.model.kind import check_same_tokens
    from keepset.model.load import adapter_tokenizer, load_tokenizer, resolve

    spec = job.recipe.reference
    if spec.path:
        path = Path(spec.path)
        full = not (path / "adapter_config.json").exists() or bool(weight_files(path))
        model = job.recipe.model.model_copy(update={"model_name_or_path": str(path)})
        other = load_tokenizer(model) if full else adapter_tokenizer(path)
        check_same_tokens(job.encoder.tokenizer, other, spec.path)
        made = (
            [fingerprint(resolve(model), model.model_revision, code=model.trust_remote_code)]
            if full
            else weights_of(path)
        )
        return path, digest([spec.path, *made]), full
    train_rows(job, layout.reference(), job.sides[1], job.ids, spec, job.recipe.seed)
    path = job.run.path / layout.reference()
    return path, digest(weights_of(path)), spec.full


def weights_of(path: Path) -> list[str]:
    """Checksums of a folder's safetensors files and of what its config says, whichever folder its base lies in."""
    return [*(file_digest(p) for p in sorted(path.glob("*.safetensors"))), *config_digests(path)]


def crossfit_losses(job: Job, token_loss: TokenLoss) -> Arrays:
    """Reference losses where each row's reference was trained on the other K - 1 folds."""
    spec = job.recipe.reference
    fold = fold_of(job.ids, spec.folds)
    nll, n_tokens = np.zeros(len(fold)), np.zeros(len(fold), dtype=np.int64)
    for k in range(spec.folds):
        train, score = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        folder = layout.reference(k)
        train_rows(job, folder, [job.sides[1][i] for i in train], job.ids[train], spec, job.recipe.seed)
        path = job.run.path / folder
        key = {**base_key(job, token_loss), "reference": digest(weights_of(path)), "fold": k}
        part = SubJob(job, score)
        found = loss_sweep(part, {f"losses-fold{k}": key}, path, token_loss)[f"losses-fold{k}"]  # type: ignore[arg-type]
        nll[score], n_tokens[score] = found["nll"], found["n_tokens"]
    return {"nll": nll, "n_tokens": n_tokens}


class SubJob:
    """A job seen through some of its rows, through one side of its pairs, or without the ends of turns."""

    def __init__(self, job: Job, indices: np.ndarray, side: int = 0, *, end_of_turn: bool = True) -> None:
        """Keep `indices` of the job's usable rows and one side of each; everything else is the job's own."""
        self.job = job
        self.rows = [job.sides[1][i][side] for i in indices]
        if not end_of_turn:
            self.rows = [content_only(row) for row in self.rows]
        self.ids = job.ids[indices]

    def __getattr__(self, name: str) -> Any:
        """Whatever isn't about rows is the job's."""
        return getattr(self.job, name)


def warmup_rows(job: Job) -> tuple[np.ndarray, int]:
    """Indices of the rows that the warm-up is trained on, and its seed."""
    from keepset.train.warmup import pick_subset

    spec = job.recipe.warmup
    seed = job.recipe.seed if spec.seed is None else spec.seed
    return pick_subset(job.ids, spec.fraction, seed, min_rows=spec.min_rows), seed


def warmup_checkpoints(job: Job) -> list[Checkpoint]:
    """The warm-up run's checkpoints, trained once and then reused."""
    from keepset.model.kind import check_same_tokens
    from keepset.model.load import adapter_tokenizer
    from keepset.train.warmup import list_checkpoints, warmup

    spec = job.recipe.warmup
    if spec.path:
        checkpoints = list_checkpoints(Path(spec.path))
        for checkpoint in checkpoints:
            check_same_tokens(job.encoder.tokenizer, adapter_tokenizer(checkpoint.path), str(checkpoint.path))
        return checkpoints if spec.checkpoints == "all" else checkpoints[-1:]
    picked, seed = warmup_rows(job)
    picked = picked[id_order(job.ids[picked])]
    sides = [job.sides[1][i] for i in picked]

    def work(path: Path) -> dict[str, Any]:
        n_tokens, n_head = count_tokens(trained_sides(sides, spec))
        with job.run.timed(f"train {layout.WARMUP}", rows=len(sides)) as spent:
            job.say(f"warm-up: {len(sides)} rows, {n_tokens} tokens, {spec.num_train_epochs:g} epochs")
            work = flops(job.loaded.model, n_tokens, n_head, passes=2) * spec.num_train_epochs
            job.release()
            found = warmup(job.recipe.model, job.recipe.lora, sides, path, spec, seed=seed, console=job.console)
            spent.update(tokens=int(n_tokens * spec.num_train_epochs), flops=work)
        return {"rows": len(sides), "checkpoints": [c.path.name for c in found]}

    job.run.step(layout.WARMUP, train_key(job, spec, job.ids[picked], seed), work)
    checkpoints = list_checkpoints(job.run.path / layout.WARMUP)
    return checkpoints if spec.checkpoints == "all" else checkpoints[-1:]


# -- representations ------------------------------------------------------------------------------------------------


def representations(job: Job, pooling: Pooling) -> tuple[np.ndarray, np.ndarray]:
    """Pooled last hidden states of the pool (n, d) and of the target's prompts + chosen answers (m, d)."""
    from keepset.features.representations import representations as pool_states

    model, budget = job.loaded.model, job.recipe.batching.token_budget
    name = f"representations-{pooling}"

    def batch(some: list[Encoded], missing: list[str]) -> dict[str, Arrays]:
        return {name: {"state": pool_states(model, some, token_budget=budget, pooling=pooling)}}

    stages = {name: {"version": VERSION, **job.data_key()}}
    out = sweep_rows(job, stages, f"representations ({pooling})", batch, head=False)

    def queries() -> Arrays:
        chosen = [chosen for chosen, _ in job.target_pairs[0]]
        with job.run.timed(f"target representations ({pooling}{job.aim})", rows=len(chosen)) as spent:
            n_tokens, _ = count_tokens(chosen)
            spent.update(tokens=n_tokens, flops=flops(model, n_tokens, 0))
            return {"state": pool_states(model, chosen, token_budget=budget, pooling=pooling)}

    key = {"version": VERSION, **job.data_key(), "target": job.target.fingerprint()}
    return out[name]["state"], job.run.once(f"queries-{pooling}", key, queries)["state"]


def embedding_weights(name: str) -> list[str]:
    """Checksums of an embedding model's weights; the fingerprint of one on the hub."""
    folder = Path(name).expanduser()
    return weights_of(folder) if folder.is_dir() else [fingerprint(name)]


def embeddings(job: Job, name: str) -> tuple[np.ndarray, np.ndarray]:
    """An embedding model's vectors of the pool's texts (n, d) and of the target's prompts + chosen answers (m, d)."""
    from keepset.features.embeddings import TextEncoder
    from keepset.model.load import pick_device

    texts, goals = job.texts(), job.target_texts(with_chosen=True)
    key = {"version": VERSION, "pool": job.pool.fingerprint(), "encoder": embedding_weights(name)}
    encoder: list[TextEncoder] = []  # loaded when the first vector is missing

    def vectors(some: list[str], spent: dict[str, Any]) -> Arrays:
        if not encoder:
            encoder.append(TextEncoder(name, device=pick_device(job.recipe.model.device)))
        n_tokens, work = encoder[0].cost(some)
        spent.update(
            rows=spent["rows"] + len(some), tokens=spent["tokens"] + n_tokens, flops=spent["flops"] + work, skip=False
        )
        return {"state": encoder[0](some, token_budget=job.recipe.batching.token_budget)}

    def compute(indices: np.ndarray, missing: list[str]) -> dict[str, Arrays]:
        return {"embeddings": vectors([texts[i] for i in indices], spent)}

    nothing = {"rows": 0, "tokens": 0, "flops": 0.0, "skip": True}
    with job.run.timed(f"embeddings ({name})", **nothing) as spent, job.tracked("embeddings", len(texts)) as done:
        out = job.run.sweep(
            {"embeddings": key}, job.ids, compute, shard_rows=job.recipe.batching.shard_rows, advance=done
        )
    goal_key = {**key, "target": job.target.fingerprint()}
    with job.run.timed(f"target embeddings ({name}{job.aim})", **nothing) as of_goals:
        queries = job.run.once("queries-embeddings", goal_key, lambda: vectors(goals, of_goals))
    return out["embeddings"]["state"], queries["state"]
