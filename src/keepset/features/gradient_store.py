"""A reusable store of projected gradients: one pool, many targets. `projection.py` says how a row is projected.

On disk: `header.json` (what the numbers depend on), `rows.bin` (n × k float16 or int8, each row by its own scale),
`rows.meta` (scale, exact norm, exact ⟨Γ, c⟩ and CRC-32 of each row), `ids.txt`, and `state.json`, replaced atomically
after the others are flushed: whatever a killed process left behind it is cut off at the next start. A row whose CRC
doesn't fit is never used: `dots` refuses it, `build_store` makes it again.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from keepset.errors import KeepsetError, PlanMismatch, RecipeError
from keepset.features.adam import AdamState
from keepset.features.gradients import recording
from keepset.features.influence import influence
from keepset.features.projection import ProjectedTarget, project, shared_direction
from keepset.features.sketch import Sketch
from keepset.model.pack import Row
from keepset.runfolder.files import write_atomic

log = logging.getLogger(__name__)

META = np.dtype([("scale", "<f4"), ("norm", "<f8"), ("shared", "<f8"), ("crc", "<u4")])  # crc: of all else, and the id
VERSION = 3


class GradientStore:
    """The files of one store. Use `create` or `open`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.sketch = Sketch(int(header["dim"]), int(header["seed"]))
        self.dtype = np.dtype(header["dtype"])
        state = _read(path / "state.json")
        try:
            self.n_rows, self.ids_bytes = int(state["rows"]), int(state["ids_bytes"])
        except (KeyError, TypeError, ValueError):
            raise KeepsetError(f"{path / 'state.json'}: damaged; delete {path} and build the store again") from None

    @staticmethod
    def create(
        path: str | Path,
        depends: Mapping[str, str],
        *,
        dim: int = 8192,
        dtype: str = "float16",
        seed: int = 0,
        map: str = "adam",
    ) -> GradientStore:
        """Open the store at `path`, making it first if there is none.

        `depends` names the fingerprints of what the rows depend on: model, adapter, tokenizer, template ...; `dim` is
        numbers a row.

        Raises:
            RecipeError: another dtype, or a dimension below 1.
            PlanMismatch: a store is there that was made with something else.
            KeepsetError: its header or state is damaged.
        """
        if dtype not in ("float16", "int8") or dim < 1:
            raise RecipeError(f"a gradient store holds float16 or int8 in at least 1 dimension, not {dtype} in {dim}")
        folder = Path(path)
        header = {"version": VERSION, "dim": dim, "dtype": dtype, "seed": seed, "map": map, "depends": dict(depends)}
        if not (folder / "state.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("rows.bin", "rows.meta", "ids.txt"):
                (folder / name).write_bytes(b"")
            write_atomic(folder / "header.json", json.dumps(header, indent=1).encode())
            write_atomic(folder / "state.json", json.dumps({"rows": 0, "ids_bytes": 0}, indent=1).encode())
        there = _read(folder / "header.json")
        if not isinstance(there.get("depends"), dict):
            raise KeepsetError(f"{folder / 'header.json'}: damaged; delete {folder} and build the store again")
        del header["depends"]
        ours = {**depends, **header}
        flat = {**there.pop("depends"), **there}
        for key in sorted(set(ours) | set(flat)):
            if ours.get(key) != flat.get(key):
                raise PlanMismatch(
                    f"{folder}: made with {key} = {flat.get(key)}, not {ours.get(key)}; use another folder"
                )
        return GradientStore(folder, flat)

    def append(self, ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray, shared: np.ndarray) -> None:
        """Add rows.

        Sketches are (n, k), of Γ⊥; norms (n,) exact ‖Γ‖; `shared` (n,) exact ⟨Γ, c⟩, zeros for a map that shares
        nothing.

        Raises:
            ValueError: shapes that don't fit, or numbers that aren't finite.
        """
        rows, meta = self._pack(ids, sketches, norms, shared)
        text = "".join(f"{i}\n" for i in ids).encode()
        for name, end, data in (
            ("rows.bin", self.row_bytes * self.n_rows, rows.tobytes()),
            ("rows.meta", META.itemsize * self.n_rows, meta.tobytes()),
            ("ids.txt", self.ids_bytes, text),
        ):
            self._put(name, [end], [data], cut=True)
        self.n_rows += len(ids)
        self.ids_bytes += len(text)
        write_atomic(
            self.path / "state.json", json.dumps({"rows": self.n_rows, "ids_bytes": self.ids_bytes}, indent=1).encode()
        )

    def replace(
        self, places: Sequence[int], ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray, shared: np.ndarray
    ) -> None:
        """Write rows anew that are in the store already, at `places` (n,); see `append`."""
        rows, meta = self._pack(ids, sketches, norms, shared)
        self._put("rows.bin", [p * self.row_bytes for p in places], [row.tobytes() for row in rows])
        self._put("rows.meta", [p * META.itemsize for p in places], [one.tobytes() for one in meta])

    def _pack(
        self, ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray, shared: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows as stored (n, k), and their `META` (n,)."""
        if sketches.shape != (len(ids), self.sketch.dim) or not np.isfinite(sketches).all():
            raise ValueError(f"sketches of shape {sketches.shape} for {len(ids)} rows, or not finite")
        top = np.abs(sketches).max(1)
        top[top == 0] = 1
        levels = 127 if self.dtype == np.int8 else 1
        meta = np.zeros(len(ids), META)
        meta["scale"], meta["norm"], meta["shared"] = top / levels, norms, shared
        scaled = sketches / meta["scale"][:, None]
        rows = np.rint(scaled).astype(np.int8) if self.dtype == np.int8 else scaled.astype(np.float16)
        meta["crc"] = [_crc(*one) for one in zip(rows, meta, ids, strict=True)]
        return rows, meta

    def _put(self, name: str, places: Sequence[int], pieces: Sequence[bytes], *, cut: bool = False) -> None:
        """Write bytes at places of a file (and end it there), flushed to disk."""
        with open(self.path / name, "r+b") as file:
            for place, piece in zip(places, pieces, strict=True):
                file.seek(place)
                file.write(piece)
            if cut:
                file.truncate()
            file.flush()
            os.fsync(file.fileno())

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes in `rows.bin`."""
        return self.sketch.dim * self.dtype.itemsize

    @property
    def ids(self) -> list[str]:
        """Ids of the rows, in order."""
        with open(self.path / "ids.txt", "rb") as file:
            return file.read(self.ids_bytes).decode("utf-8", "replace").split("\n")[: self.n_rows]

    @property
    def norms(self) -> np.ndarray:
        """(n,) exact norms."""
        return self._meta()["norm"]

    @property
    def momentum(self) -> np.ndarray:
        """(n,) exact cosine with what all rows share."""
        meta = self._meta()
        return np.divide(meta["shared"], meta["norm"], out=np.zeros(self.n_rows), where=meta["norm"] > 0)

    def _meta(self) -> np.ndarray:
        meta = np.zeros(self.n_rows, META)  # a file that was cut is made up with rows that can't be whole
        read = np.fromfile(self.path / "rows.meta", META, self.n_rows)
        meta[: len(read)] = read
        return meta

    def _blocks(self, block: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows (m, k) as stored, block by block, and where they stand."""
        with open(self.path / "rows.bin", "rb") as file:
            for start in range(0, self.n_rows, block):
                n = min(block, self.n_rows - start)
                data = file.read(n * self.row_bytes).ljust(n * self.row_bytes, b"\0")
                yield slice(start, start + n), np.frombuffer(data, self.dtype).reshape(n, -1)

    def whole(self, ids: Sequence[str], *, block: int = 4096) -> np.ndarray:
        """Which rows (n,) are as they were written for these ids (n,)."""
        meta = self._meta()
        out = np.zeros(self.n_rows, bool)
        for where, rows in self._blocks(block):
            out[where] = _fit(rows, meta[where], ids[where])
        return out

    def dots(self, target: ProjectedTarget, *, block: int = 4096) -> np.ndarray:
        """Estimate ⟨Γ_i, v_j⟩ for all rows, reading the store once, block by block.

        Returns:
            (n, j) float64.

        Raises:
            KeepsetError: a row is damaged; `build_store` makes it again.
        """
        out = np.zeros((self.n_rows, len(target.shared)))
        vectors = torch.from_numpy(np.ascontiguousarray(target.sketches, np.float32)).T
        meta, ids = self._meta(), self.ids
        for where, rows in self._blocks(block):
            fits = _fit(rows, meta[where], ids[where])
            if not fits.all():
                row = where.start + int(np.argmin(fits))
                raise KeepsetError(f"{self.path}: row {row} is damaged; build_store makes it again")
            part = torch.from_numpy(np.array(rows)).float()
            out[where] = (part @ vectors).numpy() * meta["scale"][where, None]
        return out + np.outer(meta["shared"], target.shared)


def _crc(row: np.ndarray, meta: np.void, row_id: str) -> int:
    """CRC-32 of a stored row's numbers, scale, norm and id."""
    crc = zlib.crc32(row.data)
    return zlib.crc32(row_id.encode("utf-8", "replace"), zlib.crc32(meta.tobytes()[: META.itemsize - 4], crc))


def _fit(rows: np.ndarray, meta: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Which rows have their checksum; rows without an id don't."""
    fits = [_crc(row, one, row_id) == one["crc"] for row, one, row_id in zip(rows, meta, ids, strict=False)]
    return np.array(fits + [False] * (len(rows) - len(fits)), dtype=bool)


def build_store(
    store: GradientStore,
    model: nn.Module,
    rows: Sequence[Row],
    ids: Sequence[str],
    *,
    adam: AdamState | None = None,
    token_budget: int = 1024,
    chunk: int = 256,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> GradientStore:
    """Sketch the rows that the store does not hold yet; call again after an interruption, or with more rows at the end.

    Rows in the store that are damaged are made again.

    Args:
        store: where they go; its header names the map.
        model: see `influence`.
        rows: all rows, those in the store first and in its order.
        ids: (n,) their ids.
        adam: see `influence`.
        token_budget: see `influence`.
        chunk: rows written at once.
        progress: called with the number of rows done.
        options: `matrices`, `last_layers` of `influence`.

    Raises:
        PlanMismatch: the store holds other rows than these begin with.
    """
    kind = store.header["map"]
    with recording(model, written=False, **options) as recorder:
        common = project(store.sketch, shared_direction(kind, adam, recorder.shapes), 1)[0]

    def compute(places: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = influence(
            model,
            [rows[i] for i in places],
            None,
            adam=adam,
            map=kind,
            token_budget=token_budget,
            sketch=store.sketch,
            **options,
        )
        assert part.sketch is not None
        shared = part.momentum * part.norms
        return part.sketch - np.outer(shared, common).astype(np.float32), part.norms, shared

    _mend(store, ids, compute, chunk)
    for start in range(store.n_rows, len(rows), chunk):
        places = range(start, min(start + chunk, len(rows)))
        store.append(ids[start : places.stop], *compute(places))
        if progress is not None:
            progress(places.stop)
    return store


Compute = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Makes the sketches (k, dimension), norms (k,) and shared terms (k,) of k rows by their places."""


def _mend(store: GradientStore, ids: Sequence[str], compute: Compute, chunk: int) -> None:
    """Make damaged rows of the store again, and its list of ids where that is damaged.

    Raises:
        PlanMismatch: the store holds other rows than those that `ids` begins with.
    """
    given = [str(i) for i in ids[: store.n_rows]]
    whole = store.whole(given)
    if len(given) < store.n_rows or (~whole & store.whole(store.ids)).any():
        raise PlanMismatch(f"{store.path}: its {store.n_rows} rows are not the first of these {len(ids)}")
    damaged = np.flatnonzero(~whole).tolist()
    if damaged:
        log.warning("%s: %d damaged rows are made again", store.path, len(damaged))
    for start in range(0, len(damaged), chunk):
        remade = damaged[start : start + chunk]
        store.replace(remade, [given[i] for i in remade], *compute(remade))
    text = "".join(f"{i}\n" for i in given).encode()
    if (store.path / "ids.txt").read_bytes()[: store.ids_bytes] != text:
        store._put("ids.txt", [0], [text], cut=True)


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file of a store.

    Raises:
        KeepsetError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise KeepsetError(f"{path}: damaged; delete {path.parent} and build the store again")
    return content
