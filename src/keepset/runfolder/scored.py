"""What a method answers with: one score a row, and the columns beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Scored:
    """A method's answer: one score a row, larger is better, and the columns that explain it."""

    score: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


def signed(score: np.ndarray, prefer: str) -> np.ndarray:
    """Turn the sign for `prefer: low`, so that larger stays better."""
    return score if prefer == "high" else -score


def task_parts(names: list[str], per_task: np.ndarray) -> dict[str, np.ndarray]:
    """Columns `task.<name>` of a (n, j) array; (n, 0), a method that looks at no task, has none."""
    return {f"task.{name}": column for name, column in zip(names, per_task.T, strict=False)}
