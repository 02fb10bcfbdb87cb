"""Truncated Monte-Carlo data Shapley (arXiv 1904.02868), for small pools and a utility that really retrains.

    φ(z) = E_π[ U(P_z ∪ {z}) − U(P_z) ],     π: a random order of the rows, P_z: those before z

U: any function of a set of rows, such as minus the target's loss after training on them. A scan stops once |U(all) −
U(P)| is at most `tolerance`: the rows after that get 0 in it (the truncation). With tolerance 0 the estimate is
unbiased; each order is also walked backwards (arXiv 2104.12199), which costs as much and often
halves the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores
from keepset.stages.shapley import Retraining, orders
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


@dataclass(frozen=True)
class ShapleyEstimate:
    """Values with their uncertainty and cost."""

    values: np.ndarray  # (n,)
    standard_errors: np.ndarray  # (n,), over pairs of an order and its reverse
    evaluations: int  # calls of the utility


def tmc_shapley(
    n: int,
    utility: Callable[[np.ndarray], float],
    *,
    permutations: int = 100,
    tolerance: float = 0.0,
    seed: int = 0,
) -> ShapleyEstimate:
    """Estimate Shapley values by walking random orders.

    `utility` maps an array of row indices (any order, may be empty) to a number, larger = better. `permutations` orders
    are walked, an even number: each is paired with its reverse. `tolerance` truncates; 0: never.

    Raises:
        ValueError: too few permutations for a standard error.
    """
    rounds = permutations // 2
    if rounds < 2:
        raise ValueError(f"tmc_shapley needs at least 4 permutations, not {permutations}")
    nothing, everything = utility(np.zeros(0, np.int64)), utility(np.arange(n))
    evaluations = 2
    samples = np.zeros((rounds, n))
    for sample, walks in zip(samples, orders(n, rounds, seed), strict=True):
        for walk in walks:
            before = nothing
            for place in range(n):
                if tolerance > 0 and abs(everything - before) <= tolerance:
                    break
                after = everything if place == n - 1 else utility(walk[: place + 1])
                evaluations += place < n - 1
                sample[walk[place]] += (after - before) / 2
                before = after
    errors = samples.std(axis=0, ddof=1) / np.sqrt(rounds)
    return ShapleyEstimate(samples.mean(axis=0), errors, evaluations)


@dataclass(frozen=True)
class TmcShapley(Method):
    """Truncated Monte-Carlo Shapley of real trainings; few players: rows of a tiny pool, or whole sources."""

    name = "tmc-shapley"
    when = "for up to 64 sources or categories, if many trainings are affordable; not for single rows of a real pool"
    paper = "Data Shapley, arXiv 1904.02868"
    formula = "S = E_π[U(before + z) − U(before)], U = −loss after training"
    needs = ("retraining", "target")
    cost = "retraining"
    players: Literal["row", "source", "category"] = "row"
    permutations: int = 20
    rows_per_player: int = 16
    tolerance: float = 0.0
    seed: int = 0

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        game = Retraining(self.players, int(self.rows_per_player), int(self.permutations), int(self.seed), shots)
        return {"game": game}

    def score(self, features: Features) -> Scores:
        game = features["game"]
        estimate = game.play(
            lambda n, utility: tmc_shapley(
                n, utility, permutations=int(self.permutations), tolerance=float(self.tolerance), seed=int(self.seed)
            )
        )
        return Scores(game.of_rows(estimate.values), {"standard_error": game.of_rows(estimate.standard_errors)})

    def noise(self, columns: Columns, relative: float) -> None:
        """Not known: each step of a training passes its noise on."""

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.players == "row":
            yield ("rows_per_player",), "each row is a player"
