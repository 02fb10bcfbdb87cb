"""From one value per query to one per task, and from tasks to one score: what every target-aware method shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Reduce = Literal["max", "mean"]


def task_columns(tasks: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the tasks in the order of their names.

    Returns names (j,), sorted, and column (m,) int64: the task's place in names.

    Raises:
        ValueError: there is no query.
    """
    tasks = np.asarray(tasks)
    if tasks.ndim != 1 or len(tasks) == 0:
        raise ValueError(f"a target needs at least one row with a task; got shape {tasks.shape}")
    names, column = np.unique(tasks, return_inverse=True)
    return names, column.astype(np.int64)


def reduce_queries(values: np.ndarray, tasks: Sequence[str] | np.ndarray) -> np.ndarray:
    """Reduce values of queries (n, m) of tasks (m,) to tasks (n, j): the mean over each one's, ragged tasks allowed."""
    names, column = task_columns(tasks)
    parts = [values[:, column == j].mean(axis=1, dtype=np.float64) for j in range(len(names))]
    return np.stack(parts, axis=1)


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
