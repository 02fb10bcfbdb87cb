"""Shards: a part of the rows, written whole with its checksum, or not counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from keepset.row_ids import Ids, id_order
from keepset.runfolder import layout
from keepset.runfolder.files import canonical, digest, write_atomic

Arrays = dict[str, np.ndarray]


def plan_shards(ids: Ids | np.ndarray, shard_rows: int | None = None) -> list[np.ndarray]:
    """Cut rows into shards: sorted by id, so that the plan is the same however the pool was ordered or split.

    A shard has `shard_rows` rows; by default n / 200, at least 32 and at most 2,048. Returns index arrays into `ids`;
    together they hold every row once.
    """
    n = len(ids)
    size = shard_rows or min(2048, max(32, n // 200))
    order = id_order(ids)
    return [order[start : start + size] for start in range(0, n, size)]


def read_shard(folder: Path, number: int, id_hash: str) -> Arrays | None:
    """A shard's arrays, or None if it is missing, torn, damaged or of other rows."""
    path, record_path = folder / f"{number:05d}.safetensors", folder / f"{number:05d}.json"
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        data = path.read_bytes()
        if record["sha256"] != digest(data) or record["ids"] != id_hash:
            return None
        return load_arrays(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None


def read_machine(folder: Path, number: int) -> dict[str, str] | None:
    """What a shard was made with: device, dtype and libraries; None where its record doesn't say."""
    try:
        machine = json.loads((folder / f"{number:05d}.json").read_text(encoding="utf-8")).get("machine")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return {str(k): str(v) for k, v in machine.items()} if isinstance(machine, dict) else None


def machines(folder: Path) -> dict[str, Counter[str]]:
    """How many shards of each stage of a run folder were made with what; those whose record doesn't say left out."""
    made: dict[str, Counter[str]] = {}
    for path in sorted((folder / layout.WORK_FOLDER).glob("*/*/[0-9]*.json")):
        machine = read_machine(path.parent, int(path.stem)) if path.stem.isdecimal() else None
        if machine is not None:
            stage = path.parent.relative_to(folder / layout.WORK_FOLDER).as_posix()
            made.setdefault(stage, Counter())[", ".join(f"{k} {v}" for k, v in sorted(machine.items()))] += 1
    return made


def write_shard(
    folder: Path, number: int, id_hash: str, arrays: Arrays, machine: Mapping[str, str] | None = None
) -> None:
    """Write a shard and then its record; a crash between the two leaves a shard that doesn't count.

    Args:
        folder: of the stage.
        number: of the shard.
        id_hash: of its rows.
        arrays: its columns.
        machine: what it was made with, for the record.
    """
    data = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_atomic(folder / f"{number:05d}.safetensors", data)
    record: dict[str, Any] = {"sha256": digest(data), "ids": id_hash, "rows": len(next(iter(arrays.values())))}
    if machine is not None:
        record["machine"] = dict(machine)
    write_atomic(folder / f"{number:05d}.json", canonical(record).encode())


def gather(parts: list[Arrays], order: np.ndarray) -> Arrays:
    """Put the shards' columns back into the order of the ids."""
    if not parts:
        return {}
    columns = {}
    for name in parts[0]:
        stacked = np.concatenate([part[name] for part in parts])
        columns[name] = np.empty_like(stacked)
        columns[name][order] = stacked
    return columns


class Shards:
    """The shards of one stage or of several over the same rows, in a run folder: a committed shard is work done."""

    def __init__(
        self,
        folder: Path,
        stages: Mapping[str, Mapping[str, Any]],
        ids: Ids | np.ndarray,
        shard_rows: int | None = None,
        lenders: Sequence[Path] = (),
        machine: Callable[[], Mapping[str, str]] | None = None,
        held: Collection[str] | None = None,
    ) -> None:
        """Plan the shards; nothing is read or written.

        `stages` are name -> key; everything that changes the numbers belongs into the key. `lenders` are other run
        folders whose shards of the same stage, key and rows are copied, not made again. `machine` gives what shards
        are made with here: device, dtype and libraries. `held` are the columns that stay in memory once a shard is
        there; None: all.
        """
        self.folder, self.stages, self.ids, self.lenders = folder, stages, ids, lenders
        self.machine, self.held = machine, held
        self.parts = plan_shards(ids, shard_rows)
        self.read: list[dict[str, Arrays]] = [{} for _ in self.parts]

    @cached_property
    def id_hashes(self) -> list[str]:
        """What each shard's record says of its rows."""
        return [digest([str(i) for i in self.ids[part]]) for part in self.parts]

    def place(self, stage: str) -> Path:
        """Where a stage's shards lie."""
        return stage_folder(self.folder, stage, self.stages[stage])

    def file(self, stage: str, number: int) -> Path:
        """A shard's file."""
        return self.place(stage) / f"{number:05d}.safetensors"

    def _holding(self, arrays: Arrays) -> Arrays:
        return arrays if self.held is None else {name: arrays[name].copy() for name in self.held}

    def missing(self, number: int) -> list[str]:
        """The stages whose shard of this number isn't there, or isn't whole."""
        for stage in self.stages:
            if stage not in self.read[number]:
                arrays = find_shard(self.folder, self.place(stage), number, self.id_hashes[number], self.lenders)
                if arrays is not None:
                    self.read[number][stage] = self._holding(arrays)
        return [stage for stage in self.stages if stage not in self.read[number]]

    def write(self, number: int, arrays: Mapping[str, Arrays]) -> None:
        """Commit the shard of some stages."""
        for stage, columns in arrays.items():
            place = self.place(stage)
            if not (place / layout.KEY).exists():
                write_atomic(place / layout.KEY, canonical(self.stages[stage]).encode())
            machine = None if self.machine is None else self.machine()
            write_shard(place, number, self.id_hashes[number], columns, machine)
            self.read[number][stage] = self._holding(columns)

    def gather(self) -> dict[str, Arrays]:
        """Each stage's (held) columns over all rows, in the order of the ids.

        Raises:
            KeyError: a shard is missing.
        """
        for number in range(len(self.parts)):
            if lacking := self.missing(number):
                raise KeyError(f"shard {number} of {', '.join(lacking)}")
        order = np.concatenate(self.parts) if self.parts else np.zeros(0, dtype=np.int64)
        return {stage: gather([read[stage] for read in self.read], order) for stage in self.stages}


@dataclass(frozen=True)
class Kept:
    """Where a result lies that is kept as one piece: a step's folder, or (`step` False) arrays under their name."""

    name: str
    key: Mapping[str, Any]
    step: bool = False

    @property
    def folder(self) -> str:
        """In the run folder."""
        return self.name if self.step else layout.stage(self.name, digest(self.key)[:16])


def stage_folder(folder: Path, stage: str, key: Mapping[str, Any]) -> Path:
    """Where the shards of a stage with this key lie in a run folder."""
    return folder / layout.stage(stage, digest(key)[:16])


def find_shard(folder: Path, place: Path, number: int, id_hash: str, lenders: Sequence[Path] = ()) -> Arrays | None:
    """A shard of the run folder, or one copied from a lender; None if there is none."""
    own = read_shard(place, number, id_hash)
    for lender in lenders if own is None else []:
        lent = read_shard(lender / place.relative_to(folder), number, id_hash)
        if lent is not None:
            write_shard(place, number, id_hash, lent, read_machine(lender / place.relative_to(folder), number))
            return lent
    return own
