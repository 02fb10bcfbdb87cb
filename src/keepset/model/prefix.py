"""Which rows share a beginning, that it is run once: the batches of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from keepset.model.pack import Row, needed, plan_batches

SHORTEST_PREFIX, FEWEST_ROWS = 8, 4
"""A shared beginning pays from about this many tokens and rows."""


def plan(
    rows: Sequence[Row],
    token_budget: int,
    *,
    share: bool,
    span: int | None = None,
    apart: int | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (indices, length of the shared beginning) of each batch; a pure function of the rows.

    Rows are put into groups with a common unsupervised beginning, each group is batched by length. Rows longer than
    `span` (`pack.full_span`) go without sharing, rows longer than `apart` without company.
    """
    everyone = np.arange(len(rows))
    lengths = np.asarray([needed(row, apart) for row in rows], dtype=np.int64)
    groups: list[tuple[np.ndarray, int]] = [(everyone, 0)]
    if share and len(rows):
        short = everyone if span is None else np.flatnonzero([len(row.input_ids) <= span for row in rows])
        groups = prefix_groups(rows, short)
        rest = np.setdiff1d(everyone, short)
        if len(rest):
            groups.append((rest, 0))
    for members, prefix in groups:
        for batch in plan_batches(lengths[members] - prefix, max(1, token_budget - prefix), apart):
            yield members[batch], prefix if len(batch) > 1 else 0


def prefix_groups(rows: Sequence[Row], members: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Group rows by common beginnings: a group splits off where `SHORTEST_PREFIX` more tokens are shared by enough
    rows.

    Returns:
        (indices, prefix length) of each group; the first token that is supervised is never part of the beginning,
        and every row has a token of its own.
    """
    free = {int(i): min(int(np.argmax(rows[i].supervised)), needed(rows[i]) - 1) for i in members}

    def split(group: list[int]) -> list[tuple[np.ndarray, int]]:
        common = np.asarray(rows[group[0]].input_ids[: min(free[i] for i in group)])
        for i in group:
            same = common == np.asarray(rows[i].input_ids[: len(common)])
            if not same.all():
                common = common[: int(np.argmin(same))]
        depth = len(common)
        after: dict[int, list[int]] = {}
        for i in group:
            if free[i] >= depth + SHORTEST_PREFIX:
                after.setdefault(int(rows[i].input_ids[depth]), []).append(i)
        out: list[tuple[np.ndarray, int]] = []
        rest = set(group)
        for some in after.values():
            if 4 * FEWEST_ROWS <= len(some) < len(group):
                for indices, length in split(some):
                    if length >= depth + SHORTEST_PREFIX:
                        out.append((indices, length))
                        rest -= {int(i) for i in indices}
        if rest:
            pays = depth >= SHORTEST_PREFIX and len(rest) >= FEWEST_ROWS
            out.append((np.asarray(sorted(rest)), depth if pays else 0))
        return out

    return split([int(i) for i in members]) if len(members) else []
