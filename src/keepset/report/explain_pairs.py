"""The single validation rows that pulled a row of the pool up or down, at every checkpoint: what ROSE and LESS sum up.

    a_cp(z) = <Γ_c(z), u_cp> / ‖Γ_c(z)‖,    u_cp: the unit gradient of validation row p at checkpoint c
    a_p(z)  = Σ_c w_c · a_cp(z)

With `normalise: pair` (the default of both) a task's score is the mean of a_p over its rows, exactly. With `task` the
rows' gradients are weighted before they are averaged; the a_p are then the directions alone, and said to be.

Needs the run's model and its warm-up checkpoints; nothing is trained here. One pass over the given rows and one over
the validation set a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepset.errors import KeepsetError
from keepset.methods.less import GradCosine
from keepset.methods.rose import CosineMethod, checkpoint_weights
from keepset.methods.table import METHODS, method_of
from keepset.report.read import RunData, find_row, read_run
from keepset.runfolder import layout

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.stages.encoded import Aim
    from keepset.stages.job import Job
    from keepset.train.warmup import Checkpoint

SHOWN = 4
COSINES = tuple(name for name, method in METHODS.items() if issubclass(method, (CosineMethod, GradCosine)))
TEXT = 140  # characters of a prompt or an answer
NUMBERS = 1 << 27  # most numbers of unit gradients held at once (512 MiB)


def pair_pulls(run_dir: Path, row_ids: Sequence[str], label: str | None = None) -> dict[str, dict[str, Any]]:
    """Explain rows by the single validation rows.

    Ids may be given by their beginnings; `label` is a gradient method's, by default the recipe's first.

    Returns:
        id -> `label`, `weights` (c, of the checkpoints), `exact` (whether the means are the tasks' scores), `without`
        (see `without_pairs`) and `pairs`: every validation row, strongest pull first, as `task`, `prompt`, `chosen`,
        `rejected` (their beginnings), `value` (a_p) and `checkpoints` (a_cp).

    Raises:
        KeepsetError: no such label, row, text or checkpoint, or a method that is no cosine of gradients.
    """
    from keepset.stages.job import Job

    data = read_run(Path(run_dir))
    spec, label = gradient_spec(data, label)
    assert data.recipe is not None
    ids = [str(data.ids[find_row(data, row_id)]) for row_id in row_ids]
    job = Job(data.recipe, console=Console(quiet=True))
    if job.recipe.train.loss != "sft" and any(pool.pairs for pool in job.recipe.pool):
        raise KeepsetError(f"{run_dir}: single validation rows are known for gradients of rows; here they are of pairs")
    aim, method = job.aim(spec.shots), method_of(spec)
    assert isinstance(method, (CosineMethod, GradCosine))
    rows = encoded(job, data, ids)
    checkpoints = checkpoints_of(job, spec.name, method)
    lr = np.array([c.mean_lr for c in checkpoints])
    weights = checkpoint_weights(lr if lr.any() else None, len(checkpoints))
    request = method.request
    exact = isinstance(method, CosineMethod) and request.normalise == "pair" and method.cosine
    by_best = exact and method.reduce == "max"  # the score is the best task's
    parts = np.stack([cosines(job, aim, c.path, rows, request) for c in checkpoints])  # (c, n, m)
    values = np.einsum("c,cnm->nm", weights, parts)
    texts = validation_texts(aim)
    out = {}
    for k, id_ in enumerate(ids):
        pairs = [
            {**texts[p], "value": float(values[k, p]), "checkpoints": [float(v) for v in parts[:, k, p]]}
            for p in np.argsort(-values[k], kind="stable")
        ]
        without = without_pairs(data, label, id_, pairs) if by_best else None
        out[id_] = {"label": label, "weights": weights.tolist(), "exact": exact, "pairs": pairs, "without": without}
    return out


def checkpoints_of(job: Job, name: str, method: CosineMethod | GradCosine) -> list[Checkpoint]:
    """The warm-up checkpoints that a method's scores sum up; read, never trained.

    Raises:
        KeepsetError: the run has none, or not whole ones.
    """
    from keepset.train.warmup import list_checkpoints

    given = job.recipe.warmup
    if not given.path:
        if not (job.run.path / layout.WARMUP / layout.DONE).exists():
            raise KeepsetError(f"{job.run.path}: no warm-up checkpoints here; `keepset score {name}` trains them")
        job.run.require_whole(layout.WARMUP)
    checkpoints = list_checkpoints(Path(given.path) if given.path else job.run.path / layout.WARMUP)
    checkpoints = checkpoints if given.checkpoints == "all" else checkpoints[-1:]
    return checkpoints[-method.last :] if isinstance(method, CosineMethod) else checkpoints


def gradient_spec(data: RunData, label: str | None) -> tuple[Any, str]:
    """The method's section of the recipe.

    Raises:
        KeepsetError: the run has no such method, or it isn't a cosine of gradients.
    """
    specs = {m.label: m for m in (data.recipe.methods if data.recipe else []) if m.name in COSINES}
    if label is None and specs:
        label = next(iter(specs))
    if label not in specs:
        have = ", ".join(specs) or "none"
        raise KeepsetError(f"{data.path}: single validation rows are known for {', '.join(COSINES)}; here: {have}")
    return specs[label], label


def encoded(job: Job, data: RunData, ids: Sequence[str]) -> list[Encoded]:
    """The rows' tokens.

    Raises:
        KeepsetError: a text is gone, or its row can't be encoded.
    """
    from keepset.model.encode import RowRefused
    from keepset.stages.rows import first_supervised

    rows, cap = [], job.recipe.gradients.max_completion_tokens
    for id_ in ids:
        if id_ not in data.messages:
            raise KeepsetError(f"{data.path}: the text of row {id_} is gone: its pool file is not where it was")
        try:
            row = job.encoder.encode(data.messages[id_])
            rows.append(row if cap is None else first_supervised(row, cap))
        except RowRefused as refusal:
            raise KeepsetError(f"{data.path}: row {id_} can't be encoded: {refusal}") from None
    return rows


def cosines(job: Job, aim: Aim, checkpoint: Path, rows: list[Encoded], request: Any) -> np.ndarray:
    """a_cp (n, m) at one checkpoint; the validation rows go through in groups whose gradients fit in memory."""
    from keepset.features.adam import load_adam
    from keepset.features.influence import influence
    from keepset.features.targets import target_vectors
    from keepset.model.adapters import attached

    pairs = aim.pairs
    budget, adam = job.recipe.batching.token_budget, load_adam(checkpoint)
    top = job.recipe.gradients.last_layers
    cosines = []
    with attached(job.loaded.model, checkpoint) as model:
        numbers = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        size = max(1, NUMBERS // max(1, numbers))
        for start in range(0, len(pairs), size):
            block = pairs[start : start + size]
            vectors = target_vectors(
                model, block, np.arange(len(block)), loss=request.loss, beta=request.beta, reference="none",
                normalise="pair", token_budget=budget, last_layers=top,
            )  # fmt: skip
            own = influence(model, rows, vectors, adam=adam, map=request.map, token_budget=budget, last_layers=top)
            cosines.append(own.dots / own.norms[:, None])
    return np.concatenate(cosines, axis=1)


def validation_texts(aim: Aim) -> list[dict[str, str]]:
    """Task, prompt, chosen and rejected side of each usable validation row, cut short."""
    out = []
    for index in aim.kept:
        prompt, chosen, rejected = aim.target.pair(int(index))
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected or []}
        texts = {name: " ".join(" ".join(m["content"] for m in side).split()) for name, side in sides.items()}
        short = {name: text if len(text) <= TEXT else text[: TEXT - 1] + "…" for name, text in texts.items()}
        out.append({"task": str(aim.target.tasks[int(index)]), **short})
    return out


def without_pairs(data: RunData, label: str, id_: str, pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How few validation rows would have to go for the decision to turn, the cut and all other rows as they are.

    A kept row loses its strongest supporters one by one, a row not kept its strongest opponents, in the task that gives
    its score, until the score has passed the cut. Returns `removed` (how many, of `of` in the task) and `score` then;
    None if nothing is kept or no removal turns it.
    """
    columns = data.columns[label]
    at = find_row(data, id_)
    score, kept = columns["score"], columns["selected"] > 0
    finite = np.isfinite(score)
    if not kept.any() or not finite[at]:
        return None
    cut, stays = float(score[kept & finite].min()), bool(kept[at])
    tasks: dict[str, list[float]] = {}
    for pair in pairs:
        tasks.setdefault(pair["task"], []).append(pair["value"])
    best = max(tasks, key=lambda t: float(np.mean(tasks[t])))
    others = max((float(np.mean(v)) for t, v in tasks.items() if t != best), default=-np.inf)
    left = sorted(tasks[best], reverse=stays)  # who goes first stands first
    for removed in range(1, len(left)):
        now = max(float(np.mean(left[removed:])), others)
        if (now < cut) if stays else (now >= cut):
            return {"task": best, "removed": removed, "of": len(left), "score": now, "cut": cut, "kept": stays}
    return None


def tell_without(without: dict[str, Any] | None) -> str | None:
    """`without_pairs` as a sentence."""
    if without is None:
        return None
    who = "supporting" if without["kept"] else "opposing"
    rows = "row" if without["removed"] == 1 else "rows"
    return (
        f"Without the {without['removed']} most {who} of {without['of']} validation {rows} of {without['task']} its "
        f"score would be {without['score']:.4g}: {'out' if without['kept'] else 'in'}, "
        f"at the cut of {without['cut']:.4g}."
    )


def print_pair_pulls(facts: dict[str, Any], console: Console) -> None:
    """The validation rows that pulled most up and most down, with each checkpoint's share."""
    c = len(facts["weights"])
    names = [f"ckpt {k} (x{w:.2f})" for k, w in enumerate(facts["weights"])] if c > 1 else []
    table = Table("pull", *names, "task", "validation row", box=SIMPLE_HEAD, pad_edge=False)
    pairs = facts["pairs"]
    shown = pairs if len(pairs) <= 2 * SHOWN else [*pairs[:SHOWN], *pairs[-SHOWN:]]
    for pair in shown:
        parts = [f"{v:+.3f}" for v in pair["checkpoints"]] if c > 1 else []
        text = Text(pair["prompt"] + " → ") + Text(pair["chosen"], style="green")
        if pair["rejected"]:
            text += Text(" not ", style="dim") + Text(pair["rejected"], style="red")
        table.add_row(f"{pair['value']:+.3f}", *parts, Text(pair["task"]), text)
    console.print(table)
    if len(pairs) > len(shown):
        console.print(f"({len(pairs) - len(shown)} validation rows between them are left out here)", style="dim")
    if not facts["exact"]:
        console.print("this method weights these rows before it averages them; shown are their directions alone")
    if sentence := tell_without(facts["without"]):
        console.print(Text(sentence))
