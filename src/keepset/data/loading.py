"""What pools and targets share: sections in many spellings, the dialect of a file, quarantine and strictness."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from keepset.data.dialects import PAIRS, SFT, detect, known_format
from keepset.data.fields import is_tree
from keepset.data.jsonfiles import RawRow
from keepset.data.readers import OpenFile, open_all, stem
from keepset.data.reasons import FileRefused, Quarantined, RowProblem, excerpt
from keepset.data.tables import Batches
from keepset.errors import DataError, did_you_mean
from keepset.recipe import DataSpec

Specs = DataSpec | str | Path | Sequence[DataSpec | str | Path]
_PEEK = 64


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What was found out about one file that was read; the export writes in this form again.

    An Arrow container has a schema and `batches`, which reads its rows again as they stand there.
    """

    file: str
    container: str
    dialect: str
    columns: tuple[str, ...]
    schema: pa.Schema | None
    batches: Batches | None = field(default=None, compare=False, repr=False)


def as_specs(specs: Specs) -> list[DataSpec]:
    """Return a list of sections from a path, a section or a list of either."""
    if isinstance(specs, (str, Path, DataSpec)):
        specs = [specs]
    return [s if isinstance(s, DataSpec) else DataSpec.model_validate({"path": str(s)}) for s in specs]


def source_names(specs: Sequence[DataSpec]) -> list[str]:
    """Return each section's name; sections of different paths whose stems agree get the folder's name in front."""
    names = [spec.name or stem(spec.path) for spec in specs]
    paths: dict[str, set[str]] = {}
    for name, spec in zip(names, specs, strict=True):
        paths.setdefault(name, set()).add(spec.path)
    return [
        f"{Path(spec.path).absolute().parent.name}/{name}" if not spec.name and len(paths[name]) > 1 else name
        for name, spec in zip(names, specs, strict=True)
    ]


@dataclass
class Incoming:
    """One file on its way in: its rows, and what is known of it."""

    info: FileInfo
    rows: Iterator[RawRow | Quarantined]


def incoming(spec: DataSpec, *, pairs_first: bool) -> Iterator[Incoming]:
    """Open a section's files one after another and settle each one's dialect; `limit` counts rows over all of them.

    Raises:
        FileRefused: a file that can't be used as a whole (see `REASONS`).
        DataError: `format` is not a known dialect.
    """
    forced = known_format(spec.format) if spec.format else None
    left = spec.limit
    for opened in open_all(spec.path, spec.split):
        if left is not None and left <= 0:
            return
        rows = opened.rows
        if left is not None:
            rows = itertools.islice(rows, left)
        head = _peek(rows)
        if not head:
            raise FileRefused(opened.file, "empty-file", "the file holds no rows")
        objects = [item[2] for item in head if isinstance(item, tuple)]
        dialect = forced or _dialect_of(opened, objects, pairs_first=pairs_first)
        columns = tuple(dict.fromkeys(key for row in objects for key in row))
        info = FileInfo(opened.file, opened.container, dialect, columns, opened.schema, opened.batches)
        counted = _Counted(itertools.chain(head, rows))
        yield Incoming(info, counted)
        if left is not None:
            left -= counted.n


class _Counted:
    def __init__(self, rows: Iterator[RawRow | Quarantined]) -> None:
        self.rows, self.n = rows, 0

    def __iter__(self) -> Iterator[RawRow | Quarantined]:
        return self

    def __next__(self) -> RawRow | Quarantined:
        item = next(self.rows)
        self.n += 1
        return item


def _peek(rows: Iterator[RawRow | Quarantined]) -> list[RawRow | Quarantined]:
    head: list[RawRow | Quarantined] = []
    n_rows = 0
    for item in rows:
        head.append(item)
        n_rows += isinstance(item, tuple)
        if n_rows >= _PEEK:
            break
    return head


def _dialect_of(opened: OpenFile, objects: list[dict[str, Any]], *, pairs_first: bool) -> str:
    """Name the dialect most of a file's first rows have; a few damaged ones don't decide."""
    votes = Counter(d for row in objects if (d := detect(row, pairs_first=pairs_first)))
    if votes:
        return votes.most_common(1)[0][0]
    if not objects:
        return "unknown"
    if any(is_tree(row) for row in objects):
        detail = "the rows are trees of messages (OASST): write each path through one as a row of `messages`"
        raise FileRefused(opened.file, "message-tree", detail)
    columns = ", ".join(dict.fromkeys(str(k)[:40] for k in list(objects[0])[:12])) or "(none)"
    names = ", ".join([*SFT, *PAIRS])
    plain = {str(name).strip().lower(): value for name, value in objects[0].items()}
    close = detect(plain, pairs_first=pairs_first)
    remedy = f"as {close} they must be written {', '.join(plain)}" if close else "rename them"
    detail = f"the columns {columns} fit no known dialect; {remedy}, or name the dialect with `format`: {names}"
    raise FileRefused(opened.file, "unknown-dialect", detail)


def refuse(file: str, line: int, reason: str, detail: str, text: str, strict: bool) -> Quarantined:
    """Make the quarantine entry of a row, or stop there under `strict`.

    Raises:
        FileRefused: under `strict`.
    """
    if strict:
        raise FileRefused(file, reason, detail, line=line)
    return Quarantined(file, line, reason, detail, excerpt(text))


def cell_text(value: Any) -> str | None:
    """Return a label cell (category, task) as text; null stays null."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def row_weight(row: dict[str, Any], column: str) -> float:
    """How much a row counts in the loss, from a column of numbers, also written as text (CSV).

    Raises:
        RowProblem: it isn't a finite number of 0 or more.
    """
    value = row.get(column)
    try:
        weight = float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 <= weight < float("inf"):
        raise RowProblem("bad-weight", f"'{column}' is {str(value)[:40]}: a weight is a number of 0 or more")
    return weight


def check_column_seen(spec: DataSpec, column: str, option: str, columns: set[str]) -> None:
    """Refuse a named label column that stands in no row.

    Raises:
        DataError: with the closest column that is there.
    """
    if column not in columns:
        hint = did_you_mean(column, sorted(columns))
        raise DataError(f"{spec.path}: {option} '{column}' is no column of the data{hint}")


def refuse_empty(quarantine: Sequence[Quarantined], specs: Sequence[DataSpec]) -> None:
    """Stop when nothing is left to use, telling the commonest reason and its first place.

    Raises:
        FileRefused: `no-usable-row`, with the quarantine attached.
    """
    reason, count = Counter(q.reason for q in quarantine).most_common(1)[0] if quarantine else ("empty-file", 0)
    path = ", ".join(spec.path for spec in specs)
    first = next((q for q in quarantine if q.reason == reason), None)
    cause = f"; most often {reason} ({count}), first at {first.file}:{first.line}: {first.detail}" if first else ""
    detail = f"none of the {len(quarantine)} rows could be used{cause}"
    raise FileRefused(path, "no-usable-row", detail, quarantine=tuple(quarantine))
