"""From one value per query to one per task, and from tasks to one score: what every target-aware method shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Reduce = Literal["max", "mean"]


def task_columns(tasks: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the tasks in the order of their names.

    Args:
        tasks: (m,) task label of each query.

    Returns:
        names (j,), sorted, and column (m,) int64: the task's place in names.

    Raises:
        ValueError: there is no query.
    """
    tasks = np.asarray(tasks)
    if tasks.ndim != 1 or len(tasks) == 0:
        raise ValueError(f"a target needs at least one row with a task; got shape {tasks.shape}")
    names, column = np.unique(tasks, return_inverse=True)
    return names, column.astype(np.int64)


def reduce_queries(values: np.ndarray, tasks: Sequence[str] | np.ndarray, how: Reduce = "mean") -> np.ndarray:
    """Reduce values of queries (n, m) to tasks (n, j): mean (or max) over each task's queries, ragged tasks allowed.

    Args:
        values: (n, m) one value per row and query.
        tasks: (m,) task of each query.
        how: "mean" or "max" over the queries of a task.
    """
    names, column = task_columns(tasks)
    out = np.empty((values.shape[0], len(names)), dtype=np.float64)
    for j in range(len(names)):
        part = values[:, column == j]
        out[:, j] = part.max(axis=1) if how == "max" else part.mean(axis=1, dtype=np.float64)
    return out


def reduce_tasks(per_task: np.ndarray, how: Reduce = "max") -> np.ndarray:
    """Reduce (n, j) to the score (n,): max over tasks (LESS, ROSE) or their mean. NaN stays NaN.

    Raises:
        ValueError: `how` is neither.
    """
    if how == "max":
        return per_task.max(axis=1)
    if how == "mean":
        return per_task.mean(axis=1)
    raise ValueError(f"reduce is 'max' or 'mean', not {how!r}")
