"""How much may be taken, in all and of each group: a ledger that every policy asks before it takes a row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from keepset.errors import RecipeError


def shares(sizes: np.ndarray, budget: int, quota: Literal["proportional", "equal"]) -> np.ndarray:
    """Split a budget over groups; whole numbers that sum to min(budget, sum of sizes), none above its group's size.

    "proportional" is to size, by largest remainders; what a small group can't use of "equal" shares, the others share.
    `sizes` (g,) and the result (g,) int64 are rows or tokens.

    Returns:
        (g,) int64.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    budget = min(int(budget), int(sizes.sum()))
    if quota == "proportional":
        return _apportion(budget * sizes / max(1, sizes.sum()), budget, sizes)
    out = np.zeros_like(sizes)
    while (left := budget - int(out.sum())) > 0:
        open_ = np.flatnonzero(out < sizes)
        each = left // len(open_)
        step = np.full(len(open_), each) if each else (np.arange(len(open_)) < left).astype(np.int64)
        out[open_] = np.minimum(out[open_] + step, sizes[open_])
    return out


def _apportion(exact: np.ndarray, budget: int, sizes: np.ndarray) -> np.ndarray:
    out = np.minimum(np.floor(exact + 1e-9).astype(np.int64), sizes)
    remainder = np.where(out < sizes, exact - out, -np.inf)
    out[np.argsort(-remainder, kind="stable")[: budget - int(out.sum())]] += 1
    return out


class Ledger:
    """The budget left, in all and by group. A row refused once stays refused.

    Attributes:
        taken: indices in the order they were taken.
    """

    def __init__(
        self,
        budget: int,
        costs: np.ndarray,
        candidates: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        quota: Literal["none", "proportional", "equal", "floor"] = "none",
        floor: float = 0.0,
    ) -> None:
        """Open a ledger.

        Args:
            budget: rows or tokens.
            costs: (n,) what each row costs: 1, or its tokens.
            candidates: indices that may be taken; group sizes are counted over them.
            groups: (n,) labels; needed for any quota.
            quota: how the budget is split over groups.
            floor: "floor": least share of the budget that a group gets (or all it has).

        Raises:
            RecipeError: a quota without groups, or floors above the budget.
        """
        self.left = int(budget)
        self.costs: list[int] = np.asarray(costs, dtype=np.int64).tolist()
        self.taken: list[int] = []
        self.group: list[int] = [0] * len(self.costs)
        self.room: list[int] | None = None
        self.owed: list[int] = [0]
        self.owed_in_all = 0
        if quota == "none":
            return
        if groups is None:
            raise RecipeError(f"quota '{quota}' needs a source or category for every row")
        names, codes = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
        self.group = codes.tolist()
        costs = np.asarray(costs, dtype=np.int64)
        sizes = np.bincount(codes[candidates], weights=costs[candidates], minlength=len(names)).astype(np.int64)
        if quota == "floor":
            if floor * np.count_nonzero(sizes) > 1 + 1e-9:
                raise RecipeError(
                    f"quota_floor {floor:g} for {np.count_nonzero(sizes)} groups is more than the whole budget; "
                    f"at most {1 / np.count_nonzero(sizes):.3g}"
                )
            owed = np.minimum(math.ceil(floor * budget - 1e-9), sizes)  # at least that share
            if owed.sum() > budget:  # rounded up, all of them don't fit
                owed = np.minimum(int(floor * budget + 1e-9), sizes)
            self.owed = owed.tolist()
        else:
            self.room = shares(sizes, budget, quota).tolist()
        self.owed_in_all = sum(self.owed)

    def admits(self, row: int) -> bool:
        """Return whether the row fits in what is left for its group once the other groups' floors are kept."""
        cost, group = self.costs[row], self.group[row]
        if cost > self.left or (self.room is not None and cost > self.room[group]):
            return False
        return not self.owed_in_all or cost <= self.left - self.owed_in_all + self.owed[group]

    def take(self, row: int) -> None:
        """Book a row."""
        cost, group = self.costs[row], self.group[row]
        self.left -= cost
        if self.room is not None:
            self.room[group] -= cost
        if self.owed_in_all:
            paid = min(cost, self.owed[group])
            self.owed[group] -= paid
            self.owed_in_all -= paid
        self.taken.append(int(row))

    def fill(self, order: Iterable[int]) -> None:
        """Take rows in the given order; one that doesn't fit is passed over, since a later, shorter one may."""
        for row in order:
            if self.left <= 0:
                return
            if self.admits(row):
                self.take(row)

    def release_floors(self) -> None:
        """Forget floors that no row could fill (token budgets: what is owed may be less than any row costs)."""
        self.owed_in_all = 0
