"""Where rows' positions stand in the written-out backward pass, a beginning that all of them share counted once.

Three layouts of positions, n rows, prefix of P tokens, sum S of the rows' own tokens: activations stand compact
[P | S], gradients wide [n·P | S], and attention runs over rows, each its prefix and its own tokens. Without a prefix
all are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keepset.model.attention import Run, runs_of
from keepset.model.pack import Row
from keepset.model.prefix import common_prefix


@dataclass(frozen=True)
class Places:
    """Where the rows' positions stand; see the module for the three layouts.

    Attributes:
        lengths: own tokens of each row (without the prefix).
        offsets: where each row's own tokens start, counted from the end of the prefix part.
        prefix: P.
    """

    lengths: list[int]
    offsets: list[int]
    prefix: int = 0

    @property
    def n_wide(self) -> int:
        """Positions of the wide layout."""
        return len(self.lengths) * self.prefix + sum(self.lengths)

    def wide(self, x: Tensor) -> list[Tensor]:
        """Views of a wide tensor: prefix part (n, P, …) and own part (S, …); without a prefix just x."""
        if not self.prefix:
            return [x]
        n = len(self.lengths) * self.prefix
        return [x[:n].unflatten(0, (len(self.lengths), self.prefix)), x[n:]]

    def compact(self, x: Tensor) -> list[Tensor]:
        """Views of a compact tensor that broadcast against those of `wide`."""
        return [x[: self.prefix], x[self.prefix :]] if self.prefix else [x]


@dataclass(frozen=True)
class Rows:
    """One batch as the pass takes it: index tensors between the layouts (None where they are the same)."""

    ids: Tensor
    positions: Tensor
    places: Places
    predict: Tensor  # compact positions
    predict_wide: Tensor
    labels: Tensor
    row_of: Tensor
    at_predict: Places
    rows_of_compact: Tensor | None
    compact_of_rows: Tensor | None
    rows_of_wide: Tensor | None
    wide_of_rows: Tensor | None
    groups: list[Run]


def lay_out(rows: Sequence[Row]) -> Rows:
    """Cut each row at its last predicting position and place the rows."""
    prefix = common_prefix(rows)
    ends = [int(np.flatnonzero(r.supervised)[-1]) if r.supervised.any() else len(r.input_ids) for r in rows]
    own = np.array(ends) - prefix
    starts = np.concatenate([[0], np.cumsum(own)[:-1]])
    n, total = len(rows), int(own.sum())
    ids = [
        np.asarray(rows[0].input_ids[:prefix]),
        *(np.asarray(r.input_ids[prefix:e]) for r, e in zip(rows, ends, strict=True)),
    ]
    positions = [np.arange(prefix), *(np.arange(prefix, e) for e in ends)]
    predict, labels, row_of = [], [], []
    for i, row in enumerate(rows):
        t = np.flatnonzero(row.supervised)
        predict.append(starts[i] + t - 1 - prefix)
        labels.append(np.asarray(row.input_ids)[t])
        row_of.append(np.full(len(t), i))
    counts = [len(t) for t in labels]
    indices: list[Tensor | None] = [None] * 4
    if prefix:
        compact = np.concatenate(
            [np.r_[0:prefix, prefix + s : prefix + s + w] for s, w in zip(starts, own, strict=True)]
        )
        wide = np.concatenate(
            [
                np.r_[i * prefix : (i + 1) * prefix, n * prefix + s : n * prefix + s + w]
                for i, (s, w) in enumerate(zip(starts, own, strict=True))
            ]
        )
        compact_of = np.empty(prefix + total, np.int64)
        compact_of[compact] = np.arange(len(compact))
        wide_of = np.empty(len(wide), np.int64)
        wide_of[wide] = np.arange(len(wide))
        indices = [torch.from_numpy(x.astype(np.int64)) for x in (compact, compact_of, wide, wide_of)]
    where = np.concatenate(predict)
    return Rows(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        places=Places(own.tolist(), starts.tolist(), prefix),
        predict=torch.from_numpy(where + prefix),
        predict_wide=torch.from_numpy(where + n * prefix),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        row_of=torch.from_numpy(np.concatenate(row_of)),
        at_predict=Places(counts, np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int).tolist()),
        rows_of_compact=indices[0],
        compact_of_rows=indices[1],
        rows_of_wide=indices[2],
        wide_of_rows=indices[3],
        groups=runs_of(ends),
    )
