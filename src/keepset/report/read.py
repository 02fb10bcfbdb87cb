"""What a run folder holds, read once: the scores, the comparison, the findings and the rows' texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keepset.data import Pool, load_pool
from keepset.errors import KeepsetError
from keepset.recipe import DataSpec, Recipe
from keepset.runfolder import layout
from keepset.runfolder.records import Comparison, Finding, read_json
from keepset.runfolder.run import Run
from keepset.runfolder.truth import Validation

Message = dict[str, str]
PLAIN = {"id", "source", "category", "score", "rank", "selected", "n_tokens"}


@dataclass
class RunData:
    """A run folder in memory. `ids` is the union of all methods' rows; `columns[label]` are aligned with it."""

    path: Path
    ids: np.ndarray  # (n,) str
    source: np.ndarray  # (n,) str
    category: np.ndarray  # (n,) str, "" where none
    n_tokens: np.ndarray  # (n,) float, NaN where unknown
    columns: dict[str, dict[str, np.ndarray]]  # label -> score, rank, selected, parts; NaN / 0 where a row is missing
    messages: Mapping[str, list[Message]]
    recipe: Recipe | None = None
    recipe_text: str = ""
    comparison: Comparison | None = None
    validation: Validation | None = None
    findings: tuple[Finding, ...] = ()
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)
    method_names: dict[str, str] = field(default_factory=dict)  # label -> method
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)  # label -> id -> why it has no score
    why: dict[str, Any] = field(default_factory=dict)  # label -> id -> tokens or pairs, see `explain.write_why`
    length_unit: str = "tokens"  # or "words", where no tokenizer was at hand


def read_run(path: Path, *, texts: bool = True) -> RunData:
    """Read a run folder; only `scores/` has to be there.

    With `texts` the rows' texts are looked up, in the pool files of the recipe or else in what the folder kept.

    Raises:
        KeepsetError: no scores in the folder, or a damaged file.
    """
    run = Run(path)
    stored = sorted(p.stem for p in (path / layout.SCORES_FOLDER).glob("*.parquet"))
    if not stored:
        raise KeepsetError(f"{path}: no scores here yet; `keepset run` or `keepset score` makes them")
    recipe = run.recipe() if (path / layout.RECIPE).exists() else None
    order = [m.label for m in recipe.methods] if recipe else []
    labels = [*(name for name in order if name in stored), *(name for name in stored if name not in order)]
    tables = {label: run.load_table(layout.scores(label)) for label in labels}
    data = align(path, tables)
    data.recipe = recipe
    data.recipe_text = (path / layout.RECIPE).read_text(encoding="utf-8") if recipe else ""
    data.comparison = read_json(Comparison | None, run.load_json(layout.COMPARISON), str(path / layout.COMPARISON))
    data.validation = read_json(Validation | None, run.load_json(layout.VALIDATION), str(path / layout.VALIDATION))
    data.findings = read_json(tuple[Finding, ...], run.load_json(layout.FINDINGS, []), str(path / layout.FINDINGS))
    data.manifest = as_dict(run.load_json(layout.MANIFEST))
    data.why = as_dict(run.load_json(layout.WHY))
    data.quarantine = read_lines(path / layout.QUARANTINE)
    data.costs = run.costs()
    if texts:
        data.messages = row_texts(path, recipe, data.ids)
    return data


def as_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one: a report is made from what can be shown."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[dict[str, Any]]:
    """The mappings in `value`, if it is a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; lines torn by a crash are left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return as_list(entries)


def strings(table: pa.Table, name: str) -> np.ndarray:
    """A text column as (n,) str, "" for null or a missing column."""
    if name not in table.column_names:
        return np.full(len(table), "", dtype=object)
    return np.array(["" if v is None else str(v) for v in table[name].to_pylist()], dtype=object)


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A numeric column as (n,) float64, NaN for null or a missing column."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    return np.array([np.nan if v is None else float(v) for v in table[name].to_pylist()])


def align(path: Path, tables: dict[str, pa.Table]) -> RunData:
    """Bring several methods' tables onto one list of rows.

    Raises:
        KeepsetError: a table lacks the id, score, rank or selected column.
    """
    for label, table in tables.items():
        lacking = {"id", "score", "rank", "selected"} - set(table.column_names)
        if lacking:
            raise KeepsetError(f"{path / layout.scores(label)}: no column {', '.join(sorted(lacking))}; score again")
    ids = np.unique(np.concatenate([strings(table, "id") for table in tables.values()]).astype(str))
    place = {id_: i for i, id_ in enumerate(ids)}
    n = len(ids)
    source, category = np.full(n, "", dtype=object), np.full(n, "", dtype=object)
    n_tokens = np.full(n, np.nan)
    columns: dict[str, dict[str, np.ndarray]] = {}
    names: dict[str, str] = {}
    reasons: dict[str, dict[str, str]] = {}
    unit = "tokens"
    for label, table in tables.items():
        at = np.array([place[str(id_)] for id_ in strings(table, "id")], dtype=np.int64)
        source[at], category[at] = strings(table, "source"), strings(table, "category")
        n_tokens[at] = np.where(np.isnan(floats(table, "n_tokens")), n_tokens[at], floats(table, "n_tokens"))
        columns[label] = {}
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        names[label] = metadata.get("method", label)
        unit = metadata.get("length_unit", "tokens")
        reasons[label] = {
            str(id_): why for id_, why in zip(strings(table, "id"), strings(table, "reason"), strict=True) if why
        }
        for name in ("score", "rank", "selected", *(c for c in table.column_names if c not in PLAIN)):
            kind = table.schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                continue
            full = np.full(n, 0.0 if name == "selected" else np.nan)
            full[at] = floats(table, name)
            columns[label][name] = full
    return RunData(
        path, ids, source, category, n_tokens, columns, {}, method_names=names, reasons=reasons, length_unit=unit
    )


class RowTexts(Mapping[str, list[Message]]):
    """Each row's messages, by id, read from the first pool that has it when they are asked for."""

    def __init__(self, pools: Iterable[Pool], ids: np.ndarray) -> None:
        """Look the rows with these ids (n,) up; no text is read yet."""
        self.pools: list[Pool] = []
        self.places: dict[str, tuple[int, int]] = {}
        missing = [str(id_) for id_ in ids]
        for pool in pools:
            at = pool.ids.places(missing).tolist()
            self.places |= {id_: (len(self.pools), i) for id_, i in zip(missing, at, strict=True) if i >= 0}
            missing = [id_ for id_, i in zip(missing, at, strict=True) if i < 0]
            self.pools.append(pool)
            if not missing:
                return

    def __getitem__(self, id_: str) -> list[Message]:
        pool, i = self.places[id_]
        return self.pools[pool].messages(i)

    def __contains__(self, id_: object) -> bool:
        return id_ in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def row_texts(path: Path, recipe: Recipe | None, ids: np.ndarray) -> RowTexts:
    """Each row's messages, by id, from the recipe's local pool files and else from the subsets that the run kept.

    Rows whose text can't be found (the pool moved) are missing from the mapping; nothing is downloaded for a report.
    """
    folders = ((layout.DATA_FOLDER, "*.parquet"), (layout.SUBSETS_FOLDER, "*.*"))
    files = [file for folder, pattern in folders for file in sorted((path / folder).glob(pattern))]
    kept = [DataSpec(path=str(p)) for p in files]
    here = [spec for spec in recipe.pool if spec.path != "-" and Path(spec.path).exists()] if recipe else []

    def pools() -> Iterator[Pool]:
        for specs in [here, *([spec] for spec in kept)]:
            if specs:
                with suppress(KeepsetError):  # a report without some texts is better than none; the page says so
                    yield load_pool(specs)

    return RowTexts(pools(), ids)


def find_row(data: RunData, row_id: str) -> int:
    """Index of the row whose id is, or begins with, `row_id`.

    Raises:
        KeepsetError: none, or several that differ in more than a copy's number.
    """
    ids = [str(i) for i in data.ids]
    if row_id in ids:
        return ids.index(row_id)
    matches = [i for i, id_ in enumerate(ids) if id_.startswith(row_id)] if row_id else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        beginnings = ", ".join(ids[i][:12] for i in matches[:4])
        raise KeepsetError(f"{data.path}: '{row_id}' begins {len(matches)} ids ({beginnings} ...); give more of it")
    quarantined = f"; {len(data.quarantine)} rows are in quarantine.jsonl" if data.quarantine else ""
    raise KeepsetError(f"{data.path}: no scored row '{row_id}'{quarantined}; ids stand in scores/*.parquet")
