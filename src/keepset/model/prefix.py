"""Which rows share a beginning, so that it is run once: in the batches of a forward pass, and in one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from keepset.model.pack import Row, needed, plan_batches

FORWARD_PREFIX, FEWEST_ROWS = 8, 4
"""In a forward pass a shared beginning pays from about this many tokens and rows."""
BACKWARD_PREFIX = 4
"""The same with a backward pass, where a row of company is enough."""


def common_length(rows: Iterable[Row], limit: int) -> int:
    """Return how many tokens all rows begin with, at most `limit`; no row is shorter than that."""
    first: np.ndarray | None = None
    for row in rows:
        ids = np.asarray(row.input_ids[:limit])
        first = ids if first is None else first
        same = first[:limit] == ids
        limit = limit if same.all() else int(np.argmin(same))
    return limit


def common_prefix(rows: Sequence[Row]) -> int:
    """Return how many tokens the rows of one backward pass share, before anything that predicts; 0 if that is too few.

    The last token before a supervised one predicts it, and is each row's own: its gradient is.
    """
    if len(rows) < 2:
        return 0
    first = min(int(np.argmax(r.supervised)) if r.supervised.any() else len(r.input_ids) for r in rows)
    limit = min(first, *(len(r.input_ids) for r in rows)) - 1
    length = common_length(rows, limit) if limit >= BACKWARD_PREFIX else 0
    return length if length >= BACKWARD_PREFIX else 0


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
    """Group rows by common beginnings: a group splits off where `FORWARD_PREFIX` more tokens are shared by enough
    rows.

    Returns (indices, prefix length) of each group; the first token that is supervised is never part of the beginning,
    and every row has a token of its own.
    """
    free = {int(i): min(int(np.argmax(rows[i].supervised)), needed(rows[i]) - 1) for i in members}

    def split(group: list[int]) -> list[tuple[np.ndarray, int]]:
        depth = common_length((rows[i] for i in group), min(free[i] for i in group))
        after: dict[int, list[int]] = {}
        for i in group:
            if free[i] >= depth + FORWARD_PREFIX:
                after.setdefault(int(rows[i].input_ids[depth]), []).append(i)
        out: list[tuple[np.ndarray, int]] = []
        rest = set(group)
        for branch in after.values():
            if 4 * FEWEST_ROWS <= len(branch) < len(group):
                for indices, length in split(branch):
                    if length >= depth + FORWARD_PREFIX:
                        out.append((indices, length))
                        rest -= {int(i) for i in indices}
        if rest:
            pays = depth >= FORWARD_PREFIX and len(rest) >= FEWEST_ROWS
            out.append((np.asarray(sorted(rest)), depth if pays else 0))
        return out

    return split([int(i) for i in members]) if len(members) else []
