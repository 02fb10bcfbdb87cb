"""Weights of a subset's rows by a stored score, for `keepset export --weight`."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from keepset.errors import RecipeError
from keepset.pipeline.choose import find_subset
from keepset.recipe import check_label
from keepset.runfolder import layout
from keepset.selection.weights import Form, row_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from keepset.stages.job import Job


def subset_weights(
    job: Job, subset: str, ids: Sequence[str], form: str, *, by: str | None = None, temperature: float = 1.0
) -> np.ndarray:
    """Weights (n,) of the subset's rows `ids`, by the score that chose it or by the label `by`.

    Raises:
        KeepsetError: the label has not been scored in this run folder.
        RecipeError: an unknown form, `full` without a label, or a row without a score.
    """
    if form not in get_args(Form):
        raise RecipeError(f"--weight {form}: it is one of {', '.join(get_args(Form))}")
    if not temperature > 0:
        raise RecipeError(f"--temperature {temperature:g}: it must be above 0")
    if by is None and subset == "full":
        raise RecipeError("--weight of the whole pool needs the score to go by: add --weight_by LABEL")
    label = check_label(by or find_subset(job.run, subset).label)
    table = job.run.load_table(layout.scores(label), lambda name: name in ("id", "score"))
    scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    bad = next((i for i in ids if scores.get(i) is None or not np.isfinite(scores[i])), None)
    if bad is not None:
        raise RecipeError(f"--weight: row {bad} has no score by '{label}'; name another with --weight_by")
    return row_weights(np.array([scores[i] for i in ids]), form, temperature=temperature)  # type: ignore[arg-type]
