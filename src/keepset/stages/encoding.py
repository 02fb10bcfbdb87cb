"""The pool's rows as tokens: a stage whose shards lie in the run folder, and the sequence that reads rows from them."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.data import Pool, load_pool
from keepset.lazy import Counts, Lazy
from keepset.recipe import parse_recipe
from keepset.runfolder import layout
from keepset.runfolder.execute import Executor, Here, Shared, Task
from keepset.runfolder.files import canonical, digest
from keepset.runfolder.run import Run
from keepset.runfolder.shards import Arrays, Shards
from keepset.stages.encoded import encode_pool
from keepset.stages.executors import executor

if TYPE_CHECKING:
    from keepset.model.encode import Encoded, Encoder
    from keepset.stages.job import Job

NAME = "encoding"
"""The folder of the shards in `work/`."""
HELD = ("n_tokens", "n_supervised", "n_ends", "flags")
"""Columns of the shards that stay in memory."""
OPEN_SHARDS = 256
"""Shards that are mapped at a time."""

LOST = ("", "earlier", "last")
LEFT_OUT = ("", "system", "user", "assistant", "tool", "text")
TRUNCATED, ENDLESS, TWICE = 1, 2, 4  # bits of a flag; 8 and 16: the place in LOST, the rest: in LEFT_OUT


def to_flag(side: Encoded) -> int:
    """What an `Encoded` says beside its tokens, as a byte."""
    bits = TRUNCATED * side.truncated + ENDLESS * side.endless + TWICE * side.twice
    return bits + 8 * LOST.index(side.lost) + 32 * LEFT_OUT.index(side.left_out)


def from_flag(flag: int) -> dict[str, Any]:
    """The fields of `Encoded` that a byte stands for."""
    return {
        "truncated": bool(flag & TRUNCATED), "endless": bool(flag & ENDLESS), "twice": bool(flag & TWICE),
        "lost": LOST[flag // 8 % 4], "left_out": LEFT_OUT[flag // 32],
    }  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """The pass that makes the tokens of a recipe's pool: what an executor is handed. It can be pickled.

    A shard has columns (m, s) of m rows of s sides (of pairs two, else one): `n_tokens` (0: the row is refused),
    `n_supervised`, `n_ends`, `flags`. Laid end to end in the order of rows and sides: `input_ids`, `supervised`,
    `ends`. `refused`: JSON of (place, reason, detail) of the rows that are refused.
    """

    recipe: str


OPEN: dict[Encoding, tuple[Pool, Encoder, Shards]] = {}
"""What this process has loaded for the pass that it was handed last; forks inherit it."""


def shards_of(pool: Pool, encoder: Encoder, run: Run, shard_rows: int | None) -> Shards:
    """The shards of a pool's tokens in a run folder."""
    key = {"layout": 1, "encoder": encoder.fingerprint, "pool": pool.fingerprint(), "pairs": pool.has_pairs}
    return Shards(run.path, {NAME: key}, pool.ids, shard_rows, run.lenders, held=HELD)


def encode_shards(own: Encoding, numbers: Sequence[int]) -> None:
    """Compute and commit shards, in whatever process: the function that executors are handed."""
    if own not in OPEN:  # a worker that is handed one shard after the other reads the pool once
        from keepset.model.encode import Encoder
        from keepset.model.load import load_tokenizer

        recipe = parse_recipe(json.loads(own.recipe), stored=True)
        run = Run(recipe.run_dir)
        pool = load_pool(recipe.pool, strict=recipe.strict, folder=run.path / layout.WORK_FOLDER)
        encoder = Encoder(load_tokenizer(recipe.model), recipe.model)
        OPEN.clear()
        OPEN[own] = pool, encoder, shards_of(pool, encoder, run, recipe.batching.shard_rows)
    pool, encoder, shards = OPEN[own]
    for number in numbers:
        if shards.missing(number):
            rows = pool.take(shards.parts[number])
            made = encode_pool(rows, encoder)
            shards.write(number, {NAME: to_arrays(*made, width=2 if pool.has_pairs else 1)})


def to_arrays(rows: list[tuple[Encoded, ...] | None], refused: list[tuple[int, str, str]], *, width: int) -> Arrays:
    """A shard's arrays (see `Encoding`)."""
    sides = [side for row in rows for side in (row or (None,) * width)]
    real = [side for side in sides if side is not None]

    def column(values: list[int], kind: type) -> np.ndarray:
        return np.array(values, dtype=kind).reshape(len(rows), width)

    def joined(parts: list[Any], kind: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)

    notes = json.dumps(refused, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return {
        "n_tokens": column([0 if side is None else len(side.input_ids) for side in sides], np.int32),
        "n_supervised": column([0 if side is None else int(side.supervised.sum()) for side in sides], np.int32),
        "n_ends": column([0 if side is None else len(side.ends) for side in sides], np.int32),
        "flags": column([0 if side is None else to_flag(side) for side in sides], np.uint8),
        "input_ids": joined([side.input_ids for side in real], np.int32),
        "supervised": joined([side.supervised for side in real], np.bool_),
        "ends": joined([np.array(side.ends, dtype=np.int32) for side in real], np.int32),
        "refused": np.frombuffer(notes, dtype=np.uint8),
    }


class Shard:
    """A shard's file, mapped: nothing of it is in memory but what is looked at."""

    KINDS = {"I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}

    def __init__(self, path: Path) -> None:
        """Map a file that was seen to be whole."""
        with path.open("rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self.mapped[:8], "little")
        self.header, self.start = json.loads(self.mapped[8 : 8 + size]), 8 + size
        lengths, ends = self.array("n_tokens"), self.array("n_ends")
        self.width = lengths.shape[1]
        self.tokens_at = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.ends_at = np.concatenate([[0], np.cumsum(ends, dtype=np.int64)])

    def array(self, name: str) -> np.ndarray:
        """One of its arrays, not copied."""
        about = self.header[name]
        kind, (start, end) = np.dtype(self.KINDS[about["dtype"]]), about["data_offsets"]
        flat = np.frombuffer(self.mapped, kind, (end - start) // kind.itemsize, self.start + start)
        return flat.reshape(about["shape"])

    def row(self, place: int) -> tuple[Encoded, ...]:
        """The sides of a row."""
        from keepset.model.encode import Encoded

        ids, supervised, ends = self.array("input_ids"), self.array("supervised"), self.array("ends")
        flags, sides = self.array("flags")[place].tolist(), []
        for k, flag in enumerate(flags, start=place * self.width):
            at, end = slice(*self.tokens_at[k : k + 2].tolist()), slice(*self.ends_at[k : k + 2].tolist())
            sides.append(
                Encoded(ids[at].copy(), supervised[at].copy(), ends=tuple(ends[end].tolist()), **from_flag(flag))
            )
        return tuple(sides)

    def refused(self) -> list[tuple[int, str, str]]:
        """(place, reason, detail) of the rows that are refused."""
        return [tuple(one) for one in json.loads(self.array("refused").tobytes().decode("utf-8", "surrogatepass"))]


class Tokens(Lazy[tuple["Encoded", ...]]):
    """The usable rows' sides, read from the shards when they are asked for.

    Attributes:
        usable: (n,) their numbers in the pool.
        refused: rows of the pool that are refused.
    """

    def __init__(self, shards: Shards, columns: Arrays, *, hold: Any = None) -> None:
        """Read nothing yet.

        Args:
            shards: all there.
            columns: `HELD` of all rows of the pool.
            hold: what must live as long as the shards do.
        """
        self._shards, self._hold = shards, hold
        lengths = columns["n_tokens"]
        self.usable = np.flatnonzero(lengths.all(axis=1))
        self._whole = len(self.usable) == len(lengths)
        self._columns = columns
        self.refused = len(lengths) - len(self.usable)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    @property
    def folder(self) -> str:
        """Where the shards lie in the run folder."""
        return self._shards.place(NAME).relative_to(self._shards.folder).as_posix()

    def __len__(self) -> int:
        return len(self.usable)

    @cached_property
    def _place(self) -> np.ndarray:
        """(N,) each row's place in the order of the shards."""
        order = np.concatenate(self._shards.parts)
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return place

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = Shard(self._shards.file(NAME, number))
        self._open.move_to_end(number)
        return self._open[number]

    def take(self, at: np.ndarray) -> list[tuple[Encoded, ...]]:
        """The sides of the rows with these numbers among the usable ones."""
        size = len(self._shards.parts[0])
        places = self._place[self.usable[at]]
        rows: list[Any] = [None] * len(places)
        for k in np.argsort(places, kind="stable").tolist():  # each shard is opened once
            number, place = divmod(int(places[k]), size)
            rows[k] = self._shard(number).row(place)
        return rows

    def column(self, name: str) -> np.ndarray:
        """A column of `HELD` of the usable rows, (n, s)."""
        return self._columns[name] if self._whole else self._columns[name][self.usable]

    def counts(self) -> Counts:
        """Tokens and supervised tokens of each side, (n, s)."""
        return self.column("n_tokens"), self.column("n_supervised")

    @property
    def truncated(self) -> int:
        """Rows of which a side was cut at `max_length`."""
        return int((self.column("flags") & TRUNCATED).any(axis=1).sum())

    def lost(self) -> Counter[str]:
        """How many sides lose what (see `encode.loss_words`)."""
        from keepset.model.encode import losses_of

        counts: Counter[str] = Counter()
        for flag, n in enumerate(np.bincount(self.column("flags").ravel(), minlength=256).tolist()):
            if n:
                counts.update({name: n for name in losses_of(**from_flag(flag))})
        return counts

    def refusals(self) -> Iterator[tuple[int, str, str]]:
        """(index in the pool, reason, detail) of the refused rows, in the pool's order."""
        if not self.refused:
            return
        gone = np.ones(len(self._columns["n_tokens"]), dtype=bool)
        gone[self.usable] = False
        size = len(self._shards.parts[0])
        entries: dict[int, tuple[str, str]] = {}
        for number in np.unique(self._place[gone] // size).tolist():
            part = self._shards.parts[number]
            entries |= {int(part[place]): (reason, detail) for place, reason, detail in self._shard(number).refused()}
        for index in np.flatnonzero(gone).tolist():
            yield index, *entries[index]


def tokens_of(job: Job) -> Tokens:
    """The pool's tokens: of the run folder, where what is missing is computed and kept.

    A job that doesn't hold the folder (`plan`, `explain`) writes nothing into it: what is missing there is computed in
    a temporary one.
    """
    pool, encoder, batching = job.pool, job.encoder, job.recipe.batching
    shards, folder = shards_of(pool, encoder, job.run, batching.shard_rows), None
    numbers = [number for number in range(len(shards.parts)) if shards.missing(number)]
    if numbers and not job.run.held:
        folder = tempfile.TemporaryDirectory(prefix="keepset-tokens-")
        apart = Run(folder.name)
        apart.lenders = [job.run.path, *job.run.lenders]
        shards = shards_of(pool, encoder, apart, batching.shard_rows)
        numbers = [number for number in range(len(shards.parts)) if shards.missing(number)]
    if numbers:
        own = Encoding(canonical(job.recipe.model_dump(mode="json")))
        task = Task(encode_shards, own, digest(shards.stages)[:16])
        OPEN[own] = pool, encoder, shards
        try:
            there = len(pool) - sum(len(shards.parts[number]) for number in numbers)
            with job.tracked("tokens", len(pool), there=there) as advance:
                who = Here() if folder is not None else executor_of(job)
                who.run(
                    task, numbers, is_there=lambda number: not shards.missing(number),
                    advance=lambda number: advance(len(shards.parts[number])),
                )  # fmt: skip
        finally:
            OPEN.pop(own, None)
    return Tokens(shards, shards.gather()[NAME], hold=folder)


def executor_of(job: Job) -> Executor:
    """Who makes the tokens: whoever computes for the job. Beside other workers it stays until all of them are there."""
    if job.run.claims is not None:
        return Shared(job.run.claims)
    if job.recipe.batching.workers > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads don't survive a fork
    return executor(job)
