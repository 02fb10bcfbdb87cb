"""A reusable store of projected gradients: one pool, many targets. `projection.py` says how a row is projected.

On disk: `header.json` (what the numbers depend on) and the shards 0, 1, ... of `runfolder/shards.py`, each of the next
m rows in the order in which they were added: `rows` (m, k) float16 or int8, each by its own `scale` (m,), exact `norm`
(m,), exact ⟨Γ, c⟩ `shared` (m,), and `ids` (32,), the digest of the rows' ids, which stands in the record too. A shard
that isn't whole is never used: `dots` refuses it, `build_store` makes it again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from keepset.errors import KeepsetError, PlanMismatch, RecipeError
from keepset.features.adam import AdamState
from keepset.features.gradients import recording
from keepset.features.influence import influence
from keepset.features.projection import ProjectedTarget, project, shared_direction
from keepset.features.sketch import Sketch
from keepset.model.pack import Row
from keepset.runfolder.files import digest, write_atomic
from keepset.runfolder.shards import Arrays, read_shard, write_shard

log = logging.getLogger(__name__)

VERSION = 4


@dataclass(frozen=True)
class StoredShard:
    """A shard's rows m, and, unless it is damaged, the digest of their ids and `exact` (2, m): norms, shared terms."""

    rows: int
    ids: str | None = None
    exact: np.ndarray | None = None


class GradientStore:
    """The shards of one store. Use `create`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.sketch, self.dtype = Sketch(int(header["dim"]), int(header["seed"])), np.dtype(header["dtype"])
        self.shards: list[StoredShard] = []
        while (shard := self._look(len(self.shards))) is not None:
            self.shards.append(shard)

    @staticmethod
    def create(
        path: str | Path, depends: Mapping[str, str], *, dim: int = 8192, dtype: str = "float16", seed: int = 0,
        map: str = "adam",
    ) -> GradientStore:  # fmt: skip
        """Open the store at `path`, making it first if there is none.

        `depends` names the fingerprints of what the rows depend on: model, adapter, tokenizer, template ...; `dim` is
        numbers a row.

        Raises:
            RecipeError: another dtype, or a dimension below 1.
            PlanMismatch: a store is there that was made with something else.
            KeepsetError: its header is damaged.
        """
        if dtype not in ("float16", "int8") or dim < 1:
            raise RecipeError(f"a gradient store holds float16 or int8 in at least 1 dimension, not {dtype} in {dim}")
        file = Path(path) / "header.json"
        header = {"version": VERSION, "dim": dim, "dtype": dtype, "seed": seed, "map": map}
        if not file.exists() and not any(file.parent.glob("*.safetensors")):
            write_atomic(file, json.dumps({**header, "depends": dict(depends)}, indent=1).encode())
        there = _json(file)
        if not isinstance(there.get("depends"), dict):
            raise KeepsetError(f"{file}: damaged; delete {path} and build the store again")
        ours, flat = {**depends, **header}, {**there.pop("depends"), **there}
        for key in sorted(ours.keys() | flat.keys()):
            if ours.get(key) != flat.get(key):
                made = f"made with {key} = {flat.get(key)}, not {ours.get(key)}"
                raise PlanMismatch(f"{path}: {made}; use another folder")
        return GradientStore(Path(path), flat)

    def _look(self, number: int) -> StoredShard | None:
        """The shard of this number; None if there is none whose row count can be known."""
        path = self.path / f"{number:05d}.json"
        record = _json(path)
        if (arrays := self._read(number, str(record.get("ids")))) is not None:
            return StoredShard(len(arrays["rows"]), record["ids"], np.stack([arrays["norm"], arrays["shared"]]))
        counts = [record.get("rows"), _rows_in(path.with_suffix(".safetensors"))]
        sizes = {n for n in counts if isinstance(n, int) and n > 0}
        return StoredShard(sizes.pop()) if len(sizes) == 1 else None

    def _read(self, number: int, id_hash: str) -> Arrays | None:
        """A shard's arrays; None if it isn't a whole one for rows with these ids."""
        arrays = read_shard(self.path, number, id_hash)
        return arrays if arrays and "ids" in arrays and arrays["ids"].tobytes().hex() == id_hash else None

    def write(
        self, ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray, shared: np.ndarray, number: int | None = None
    ) -> None:
        """Write m rows as the next shard, or anew as the shard of this number.

        Sketches are (m, k), of Γ⊥; norms (m,) exact ‖Γ‖; `shared` (m,) exact ⟨Γ, c⟩, zeros for a map that shares
        nothing.

        Raises:
            ValueError: shapes that don't fit, or numbers that aren't finite.
        """
        if sketches.shape != (len(ids), self.sketch.dim) or not np.isfinite(sketches).all():
            raise ValueError(f"sketches of shape {sketches.shape} for {len(ids)} rows, or not finite")
        number = len(self.shards) if number is None else number
        if number == len(self.shards):  # files from here on are of shards that can't be placed; the last goes first
            for path in sorted(self.path.glob("[0-9]*.*"), reverse=True):
                if path.name >= f"{number:05d}":
                    path.unlink()
        top = np.abs(sketches).max(1)
        top[top == 0] = 1
        scale = (top / (127 if self.dtype == np.int8 else 1)).astype(np.float32)
        rows = sketches / scale[:, None]
        rows = np.rint(rows).astype(np.int8) if self.dtype == np.int8 else rows.astype(np.float16)
        exact, id_hash = np.stack([norms, shared]).astype(np.float64), digest([str(i) for i in ids])
        arrays = {"rows": rows, "scale": scale, "norm": exact[0], "shared": exact[1]}
        write_shard(self.path, number, id_hash, {**arrays, "ids": np.frombuffer(bytes.fromhex(id_hash), np.uint8)})
        self.shards[number : number + 1] = [StoredShard(len(ids), id_hash, exact)]

    def missing(self, ids: Sequence[str], chunk: int) -> list[tuple[int, range]]:
        """Number and places in `ids` (n,) of the shards to make: the damaged ones, then new ones of `chunk` rows.

        Raises:
            PlanMismatch: the store holds other rows than those that `ids` begins with.
        """
        shards, start = [], 0
        for number, shard in enumerate(self.shards):
            places = range(start, start := start + shard.rows)
            given = digest([str(i) for i in ids[places.start : start]])
            if start > len(ids) or shard.ids not in (None, given):
                raise PlanMismatch(f"{self.path}: its {self.n_rows} rows are not the first of these {len(ids)}")
            if shard.ids is None:
                shards.append((number, places))
        new = [range(first, min(first + chunk, len(ids))) for first in range(start, len(ids), chunk)]
        return shards + list(enumerate(new, len(self.shards)))

    @property
    def n_rows(self) -> int:
        """Rows in the store, those of damaged shards too."""
        return sum(shard.rows for shard in self.shards)

    @property
    def norms(self) -> np.ndarray:
        """(n,) exact norms."""
        return self._exact()[0]

    @property
    def momentum(self) -> np.ndarray:
        """(n,) exact cosine with what all rows share."""
        norms, shared = self._exact()
        return np.divide(shared, norms, out=np.zeros(self.n_rows), where=norms > 0)

    def _exact(self) -> np.ndarray:
        """(2, n): norms and shared terms."""
        parts = [self._damaged(i) if s.exact is None else s.exact for i, s in enumerate(self.shards)]
        return np.concatenate([np.zeros((2, 0)), *parts], axis=1)

    def _damaged(self, number: int) -> NoReturn:
        raise KeepsetError(f"{self.path}: shard {number} is damaged; open the store and build_store makes it again")

    def dots(self, target: ProjectedTarget) -> np.ndarray:
        """Estimate ⟨Γ_i, v_j⟩ for all rows, reading the store once, shard by shard.

        Returns (n, j) float64.

        Raises:
            KeepsetError: a shard is damaged; `build_store` makes it again.
        """
        out = np.zeros((self.n_rows, len(target.shared)))
        vectors, start = torch.from_numpy(np.ascontiguousarray(target.sketches, np.float32)).T, 0
        for number, shard in enumerate(self.shards):
            arrays = self._read(number, str(shard.ids)) or self._damaged(number)
            part = (torch.from_numpy(np.array(arrays["rows"])).float() @ vectors).numpy() * arrays["scale"][:, None]
            out[start : start + shard.rows] = part + np.outer(arrays["shared"], target.shared)
            start += shard.rows
        return out


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _rows_in(path: Path) -> int | None:
    """How many rows a shard's file has, by the shape in its head; None if that can't be read."""
    try:
        with safe_open(path, "numpy") as file:
            return int(file.get_slice("rows").get_shape()[0])
    except (OSError, IndexError, SafetensorError):
        return None


def build_store(
    store: GradientStore, model: nn.Module, rows: Sequence[Row], ids: Sequence[str], *, adam: AdamState | None = None,
    token_budget: int = 1024, chunk: int = 256, progress: Callable[[int], None] | None = None, **options: Any,
) -> GradientStore:  # fmt: skip
    """Sketch the rows that the store does not hold yet; call again after an interruption, or with more rows at the end.

    Shards in the store that are damaged are made again.

    The rows in the store come first in `rows`, in its order. A new shard has at most `chunk` rows; `progress` is told
    the rows of each shard made; `options` are `matrices` and `last_layers` of `influence`.

    Raises:
        PlanMismatch: the store holds other rows than these begin with.
    """
    kind, shards = store.header["map"], store.missing(ids, chunk)
    with recording(model, written=False, **options) as recorder:
        common = project(store.sketch, shared_direction(kind, adam, recorder.shapes), 1)[0]
    for number, places in shards:
        if number < len(store.shards):
            log.warning("%s: shard %d is damaged and made again", store.path, number)
        part = influence(
            model, [rows[i] for i in places], None, adam=adam, map=kind, token_budget=token_budget, sketch=store.sketch,
            **options,
        )  # fmt: skip
        assert part.sketch is not None
        shared = part.momentum * part.norms
        sketches = part.sketch - np.outer(shared, common).astype(np.float32)
        store.write([ids[i] for i in places], sketches, part.norms, shared, number)
        if progress is not None:
            progress(len(places))
    return store
