"""A pool's rows and a target's pairs as tokens, and the target as a method sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from keepset.data import Pool, Target
from keepset.errors import DataError

if TYPE_CHECKING:
    from keepset.model.encode import Encoded, Encoder
    from keepset.stages.job import Job

    Pair = tuple[Encoded, Encoded | None]


class Aim:
    """The target as a method sees it: all of it, or the first `shots` rows a task."""

    def __init__(self, target: Target, job: Job, shots: int | None) -> None:
        """Nothing is tokenised before it is asked for.

        Attributes:
            target: the rows.
            title: how stages that aim at fewer shots than the recipe's target are told apart in `costs.jsonl`.
            names: (j,) the tasks' names, sorted.
            codes: (m,) each row's task as an index into `names`.
        """
        self.target, self._job = target, job
        self.title = "" if shots is None else f", {shots} shots"
        names, self.codes = np.unique(np.asarray(target.tasks, dtype=str), return_inverse=True)
        self.names = [str(n) for n in names]

    @cached_property
    def _encoded(self) -> tuple[list[Pair], np.ndarray]:
        return encode_pairs(self.target, self._job.encoder, self._job.say)

    @property
    def pairs(self) -> list[Pair]:
        """Chosen and rejected side (or None) of the usable rows, as tokens."""
        return self._encoded[0]

    @property
    def kept(self) -> np.ndarray:
        """Indices of the usable rows in `target`."""
        return self._encoded[1]

    @property
    def chosen(self) -> list[Encoded]:
        """The usable rows' chosen sides."""
        return [chosen for chosen, _ in self.pairs]

    @property
    def pair_codes(self) -> np.ndarray:
        """The usable rows' tasks as indices into `names`."""
        return self.codes[self.kept]

    def texts(self, *, with_chosen: bool) -> list[str]:
        """The prompts as plain text, with or without the chosen answer."""
        pairs = (self.target.pair(i) for i in range(len(self.target)))
        return [
            "\n".join(m["content"] for m in ([*prompt, *chosen] if with_chosen else prompt))
            for prompt, chosen, _ in pairs
        ]


def encode_pool(pool: Pool, encoder: Encoder) -> tuple[list[tuple[Encoded, ...] | None], list[tuple[int, str, str]]]:
    """Encode every row's sides; None, and (index, reason, detail), where one is refused."""
    from keepset.model.encode import RowRefused, encode_all

    if not pool.has_pairs:
        rows, refused = encode_all(encoder, pool.all_messages())
        return [None if row is None else (row,) for row in rows], refused
    sides: list[tuple[Encoded, ...] | None] = []
    refused = []
    for i, (prompt, chosen, rejected) in enumerate(pool.all_pairs()):
        try:
            sides.append((encoder.encode_pair(prompt, chosen), encoder.encode_pair(prompt, rejected)))
        except RowRefused as problem:
            sides.append(None)
            refused.append((i, problem.reason, problem.detail))
    return sides, refused


def encode_pairs(target: Target, encoder: Encoder, say: Callable[[str], None]) -> tuple[list[Pair], np.ndarray]:
    """Encode prompt + chosen and prompt + rejected of every row; a row with a refused side is said and left out.

    Returns `(chosen, rejected or None)` of each usable row, and the usable rows' indices (m,).

    Raises:
        DataError: none is left.
    """
    from keepset.model.encode import RowRefused, what_is_lost

    pairs: list[Pair] = []
    kept = []
    for i in range(len(target)):
        prompt, chosen, rejected = target.pair(i)
        try:
            pairs.append(
                (encoder.encode_pair(prompt, chosen), encoder.encode_pair(prompt, rejected) if rejected else None)
            )
            kept.append(i)
        except RowRefused as refused:
            place = target.table.slice(i, 1).select(["file", "line"]).to_pylist()[0]
            say(f"quarantined {place['file']}:{place['line']}: {refused.reason}: {refused.detail}")
    if not pairs:
        raise DataError("no usable row in the target; raise model.max_length or set model.overlong: truncate")
    for line in what_is_lost(side for pair in pairs for side in pair if side is not None):
        say(f"target: {line}")
    return pairs, np.array(kept)
