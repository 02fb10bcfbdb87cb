"""Random: the control every method must beat at the same size.

    S(z) = u(id of z, seed),  u uniform in (0, 1)

The draw belongs to the row's content id and the seed: shuffling or splitting the pool's files draws the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepset.data.ids import uniform_by_id
from keepset.methods.method import Columns, Features, Method, Scores


def random_(ids: int | Sequence[str] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Score rows by independent uniform numbers.

    `ids` are (n,) content ids, or the number of rows, when position is all there is. Returns (n,) float64 in (0, 1).
    """
    return uniform_by_id([str(i) for i in range(ids)] if isinstance(ids, int) else ids, seed)


@dataclass(frozen=True)
class Random(Method):
    """Uniform numbers by content id."""

    name = "random"
    when = "beside every other method, always: a choice that random rows match is not worth its price"
    paper = "–"
    formula = "S = u(id, seed)"
    needs = ("text",)
    cost = "free"
    seed: int = 0

    def score(self, features: Features) -> Scores:
        return Scores(random_(features.ids, self.seed))

    def noise(self, columns: Columns, relative: float) -> None:
        """None: no model runs."""
