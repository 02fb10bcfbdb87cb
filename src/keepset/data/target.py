"""Target: the few examples that say what is wanted, as (prompt, chosen, rejected) with a task each."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from keepset.data.columns import MESSAGES, ChatColumn, Message, marked, pair_digest, unique_ids
from keepset.data.dialects import Pair, as_pair
from keepset.data.loading import (
    FileInfo,
    Specs,
    as_specs,
    cell_text,
    check_column_seen,
    incoming,
    refuse,
    refuse_empty,
    source_names,
)
from keepset.data.reasons import FileRefused, Quarantined, RowProblem
from keepset.recipe import DataSpec

log = logging.getLogger(__name__)

#: `length_matched` keeps a pair whose sides differ by at most this share of the longer one, in characters.
LENGTH_MATCH = 0.2


@dataclass(frozen=True)
class Target:
    """Validation examples.

    Attributes:
        table: id, source, task, prompt, chosen, rejected (null for SFT rows), raw, file, line.
        quarantine: rows that can't be used, with their place and reason.
        duplicates: rows whose content stands earlier in the target.
        left_out: usable rows that `shots` and `length_matched` left out, counted by which.
        files: what each file was found to be.
    """

    table: pa.Table
    quarantine: tuple[Quarantined, ...] = ()
    duplicates: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    files: tuple[FileInfo, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.table.num_rows)

    @property
    def n_in(self) -> int:
        """Rows read: used + left out on purpose + quarantined."""
        return len(self) + sum(self.left_out.values()) + len(self.quarantine)

    @property
    def ids(self) -> np.ndarray:
        """Content ids (m,), object array of str."""
        return np.array(self.table["id"].to_pylist(), dtype=object)

    @property
    def tasks(self) -> np.ndarray:
        """The task of each row (m,), object array of str."""
        return np.array(self.table["task"].to_pylist(), dtype=object)

    @property
    def has_pairs(self) -> bool:
        """Whether every row has a rejected side."""
        return len(self) > 0 and self.table["rejected"].null_count == 0

    def pair(self, index: int) -> tuple[list[Message], list[Message], list[Message] | None]:
        """Return one row's prompt, chosen and rejected messages."""
        row = self.table.slice(int(index), 1).select(["prompt", "chosen", "rejected"]).to_pylist()[0]
        return marked(row["prompt"]), marked(row["chosen"]), marked(row["rejected"])

    def take(self, indices: Sequence[int] | np.ndarray) -> Target:
        """Return these rows, in this order, without the quarantine and the counts."""
        table = self.table.take(pa.array(np.asarray(indices, dtype=np.int64)))
        return replace(self, table=table, quarantine=(), duplicates=0, left_out={})

    def shots(self, n: int, seed: int) -> Target:
        """Return up to n rows a task, drawn as `load_target` draws: the n-shot set is part of the (n+1)-shot set."""
        tasks, ids = self.tasks, self.ids
        keys = [
            draw_key(seed, str(t), bytes.fromhex(str(i).partition("-")[0])) for t, i in zip(tasks, ids, strict=True)
        ]
        taken: Counter[str] = Counter()
        kept = []
        for i in sorted(range(len(self)), key=keys.__getitem__):
            taken[tasks[i]] += 1
            if taken[tasks[i]] <= n:
                kept.append(i)
        return self.take(sorted(kept))

    def fingerprint(self) -> str:
        """Return sha256 hex over the sorted (id, task) pairs: the same whatever the order of rows and files."""
        both = zip(self.table["id"].to_pylist(), self.table["task"].to_pylist(), strict=True)
        return hashlib.sha256("\n".join(sorted(f"{i} {t}" for i, t in both)).encode()).hexdigest()


@dataclass(slots=True)
class _Row:
    digest: bytes
    pair: Pair
    source: str
    task: str
    raw: str
    file: str
    line: int


def load_target(specs: Specs, *, seed: int = 0, strict: bool = False, allow_empty: bool = False) -> Target:
    """Read a target.

    Args:
        specs: a path, a `DataSpec`, or a list of them. An SFT row gives its last answer as `chosen`, no `rejected`.
        seed: draws the shots. The n-shot set of a task is the start of its (n+1)-shot set; file order plays no part.
        strict: stop at the first bad row instead of quarantining it.
        allow_empty: return a target without rows rather than raising when none is left.

    Returns:
        The target. With `shots` its rows stand task by task in the order of the draw, else in the files' order.

    Raises:
        FileRefused: (a DataError) a file that can't be used as a whole, a bad row under `strict`, or no usable row.
        DataError: an unknown `format`, or a `task_column` other than "task" that is in no row.
    """
    specs = as_specs(specs)
    quarantine: list[Quarantined] = []
    files: list[FileInfo] = []
    kept: list[_Row] = []
    left_out: Counter[str] = Counter()
    for spec, source in zip(specs, source_names(specs), strict=True):
        rows, columns = _read(spec, source, strict, quarantine, files)
        if spec.task_column != "task" and columns:
            check_column_seen(spec, spec.task_column, "task_column", columns)
        if spec.length_matched:
            matched = [row for row in rows if _matched(row.pair)]
            left_out["length_matched"] += len(rows) - len(matched)
            rows = matched
        if spec.shots is not None:
            drawn = draw_shots(rows, spec.shots, seed)
            left_out["shots"] += len(rows) - len(drawn)
            rows = drawn
        kept += rows
    table, duplicates = _table(kept)
    target = Target(table, tuple(quarantine), duplicates, dict(+left_out), tuple(files))
    if not kept and not allow_empty:
        if left_out:
            raise FileRefused(
                ", ".join(s.path for s in specs), "no-usable-row", "length_matched left out every pair of the target"
            )
        refuse_empty(quarantine, specs)
    if quarantine:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(q.reason for q in quarantine).most_common(5))
        log.warning("%d of %d target rows quarantined: %s", len(quarantine), target.n_in, counts)
    return target


def _read(
    spec: DataSpec, source: str, strict: bool, quarantine: list[Quarantined], files: list[FileInfo]
) -> tuple[list[_Row], set[str]]:
    rows: list[_Row] = []
    columns: set[str] = set()
    for arriving in incoming(spec, pairs_first=True):
        info = arriving.info
        files.append(info)
        columns.update(info.columns)
        convert = as_pair(info.dialect) if info.dialect != "unknown" else None
        for item in arriving.rows:
            if not isinstance(item, tuple):
                if strict:
                    raise FileRefused(item.file, item.reason, item.detail, line=item.line)
                quarantine.append(item)
                continue
            line, text, row = item
            assert convert is not None
            try:
                pair = convert(row)
                digest = pair_digest(*pair)
            except RowProblem as bad:
                quarantine.append(refuse(info.file, line, bad.reason, bad.detail, text, strict))
                continue
            task = cell_text(row.get(spec.task_column)) or source
            rows.append(_Row(digest, pair, source, task, text, info.file, line))
    return rows, columns


def _matched(pair: Pair) -> bool:
    _, chosen, rejected = pair
    if rejected is None:
        return True
    a, b = (sum(len(content) for _, content in side) for side in (chosen, rejected))
    return abs(a - b) <= LENGTH_MATCH * max(a, b)


def draw_key(seed: int, task: str, digest: bytes) -> bytes:
    """A row's place in the draw."""
    return hashlib.sha256(f"{seed}\x1f{task}\x1f".encode() + digest).digest()


def draw_shots(rows: Sequence[_Row], shots: int, seed: int) -> list[_Row]:
    """Draw up to `shots` rows a task, by the rank of sha256(seed, task, content): nested, whatever the file order."""
    tasks: dict[str, list[tuple[bytes, _Row]]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append((draw_key(seed, row.task, row.digest), row))
    drawn: list[_Row] = []
    for task, members in tasks.items():
        members.sort(key=lambda member: member[0])
        if len(members) < shots:
            log.warning(
                "task '%s' has %d pairs, fewer than the %d shots asked for: all are used", task, len(members), shots
            )
        drawn += [row for _, row in members[:shots]]
    return drawn


def _table(rows: Sequence[_Row]) -> tuple[pa.Table, int]:
    prompt, chosen, rejected = ChatColumn(), ChatColumn(), ChatColumn()
    for row in rows:
        prompt.append(row.pair[0])
        chosen.append(row.pair[1])
        rejected.append(row.pair[2])
    ids, duplicates = unique_ids(b"".join(row.digest for row in rows))
    schema = pa.schema(
        [("id", pa.string()), ("source", pa.string()), ("task", pa.string())]
        + [(name, MESSAGES) for name in ("prompt", "chosen", "rejected")]
        + [("raw", pa.large_string()), ("file", pa.string()), ("line", pa.int64())]
    )
    columns = [
        ids,
        pa.array([row.source for row in rows], pa.string()),
        pa.array([row.task for row in rows], pa.string()),
        prompt.finish(),
        chosen.finish(),
        rejected.finish(),
        pa.array([row.raw for row in rows], pa.large_string()),
        pa.array([row.file for row in rows], pa.string()),
        pa.array([row.line for row in rows], pa.int64()),
    ]
    return pa.table(columns, schema=schema), duplicates
