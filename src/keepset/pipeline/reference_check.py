"""Did the reference learn something that holds beyond its own rows? Its loss and the base's on rows it never saw.

DavIR's reference is trained on the rows it scores, so a drop of their loss may be memory alone. The cheapest rows that
tell are the evaluation's, which lie there anyway: two forward passes over at most `MOST_ROWS` of them. A cross-fitted
reference needs none: there every row of the pool was held out from the model that scores it (`diagnose.loss_findings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.evaluate.statistics import bootstrap_ratio
from keepset.methods.table import METHODS
from keepset.runfolder.files import digest
from keepset.runfolder.records import Finding

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.pipeline.learn import Learner
    from keepset.stages.job import Job

MOST_ROWS = 64


class OtherRows:
    """A job seen with rows that are not in its pool."""

    def __init__(self, job: Job, rows: list[Encoded]) -> None:
        """Name the rows by their tokens; equal ones by a number too."""
        names = [digest(row.input_ids.tobytes() + row.supervised.tobytes())[:32] for row in rows]
        self.job, self.rows = job, rows
        self.ids = np.array([f"{name}-{names[:i].count(name)}" for i, name in enumerate(names)])

    def data_key(self) -> dict[str, Any]:
        """What the losses depend on: the model, the template and these rows."""
        return {**self.job.data_key(), "pool": digest(sorted(self.ids.tolist()))}

    def __getattr__(self, name: str) -> Any:
        """Whatever isn't about rows is the job's."""
        return getattr(self.job, name)


def check_reference(job: Job, learner: Learner) -> list[Finding]:
    """Hold the reference against the base on the evaluation's rows, if a method of the recipe has a reference."""
    labels, rows = rows_to_check(job, learner)
    if not labels:
        return []
    if not rows:
        return [not_checked()]
    ini, ref, n_tokens = held_out_losses(job, rows)
    return [held_out_finding(ini, ref, n_tokens, f"{len(rows)} held-out rows")]


def rows_to_check(job: Job, learner: Learner) -> tuple[list[str], list[Encoded]]:
    """The labels whose reference is to be checked, and at most `MOST_ROWS` of the evaluation's rows to do it on."""
    labels = [m.label for m in job.recipe.methods if "reference" in METHODS[m.name].needs]
    if not labels or job.recipe.reference.folds >= 2 or learner.transfer:
        return [], []
    rows = list(learner.eval_rows[0]) if learner.eval_rows else []
    rows += [chosen for chosen, _ in learner.eval_pairs[0]] if learner.eval_pairs else []
    places = np.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).astype(int)  # of every file, not the first only
    return labels, [rows[i] for i in places]


def held_out_losses(job: Job, rows: list[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed losses (n,) in nats under base and reference, and supervised tokens (n,), of rows outside the pool."""
    from keepset.stages.losses import base_key, full_reference_losses, loss_sweep, reference_model

    part: Any = OtherRows(job, rows)
    path, fingerprint, full = reference_model(job)
    stages: dict[str, dict[str, Any]] = {"losses-heldout-base": base_key(part, "ce")}
    key = {**base_key(part, "ce"), "reference": fingerprint}
    if full:
        base = loss_sweep(part, stages, None, "ce")["losses-heldout-base"]
        found = full_reference_losses(part, path, {"losses-heldout-reference": key}, "ce")
        return base["nll"], found["losses-heldout-reference"]["nll"], base["n_tokens"]
    found = loss_sweep(part, {**stages, "losses-heldout-reference": key}, path, "ce")
    base = found["losses-heldout-base"]
    return base["nll"], found["losses-heldout-reference"]["nll"], base["n_tokens"]


def held_out_finding(ini: np.ndarray, ref: np.ndarray, n_tokens: np.ndarray, where: str, label: str = "") -> Finding:
    """The drop of the loss on rows that the reference was not trained on, with its 95 % interval over rows."""
    drop = bootstrap_ratio(ini - ref, n_tokens)
    text = (f"on {where} the reference's loss is {drop.value:+.3f} nats a token below the base's, "
            f"95 % interval {drop.low:+.3f} to {drop.high:+.3f}")  # fmt: skip
    if drop.low > 0:
        return Finding("reference-held-out", "info", label, round(drop.value, 4), text,
                       "what it learnt holds beyond its own rows")  # fmt: skip
    return Finding("reference-held-out", "warning", label, round(drop.value, 4), text,
                   "not better than the base where it was not trained: scores may rank memory; train it longer or at "
                   "another rate, or cross-fit with reference.folds")  # fmt: skip


def not_checked() -> Finding:
    """No rows to tell by."""
    return Finding("reference-held-out", "info", "", None, "not measured: no rows that the reference did not see",
                   "name evaluate.heldout or evaluate.pairs, or set reference.folds")  # fmt: skip
