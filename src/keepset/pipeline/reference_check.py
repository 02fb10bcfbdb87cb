"""Did the reference learn something that holds beyond its own rows? Its loss and the base's on rows it never saw.

DavIR's reference is trained on the rows it scores, so a drop of their loss may be memory alone. The cheapest rows that
tell are the evaluation's, which lie there anyway: two forward passes over at most `MOST_ROWS` of them. A cross-fitted
reference needs none: there every row of the pool was held out from the model that scores it (`findings.loss_findings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keepset.evaluate.statistics import bootstrap_ratio
from keepset.methods.table import METHODS
from keepset.runfolder.records import Finding
from keepset.stages.losses import held_out_losses
from keepset.stages.rows import rows_outside

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.pipeline.learn import Learner
    from keepset.stages.job import Job

MOST_ROWS = 64


def check_reference(job: Job, learner: Learner) -> list[Finding]:
    """Hold the reference against the base on the evaluation's rows, if a method of the recipe has a reference."""
    labels, rows = rows_to_check(job, learner)
    if not labels:
        return []
    if not rows:
        return [
            Finding("reference-held-out", "info", "", None, "not measured: no rows that the reference did not see",
                    "name evaluate.heldout or evaluate.pairs, or set reference.folds")
        ]  # fmt: skip
    ini, ref, n_tokens = held_out_losses(job, rows_outside(rows))
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
