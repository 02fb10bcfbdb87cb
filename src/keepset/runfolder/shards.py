"""Shards: a part of the rows, written whole with its checksum, or not counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from keepset.runfolder.files import canonical, digest, write_atomic

Arrays = dict[str, np.ndarray]


def plan_shards(ids: np.ndarray, shard_rows: int | None = None) -> list[np.ndarray]:
    """Cut rows into shards: sorted by id, so that the plan is the same however the pool was ordered or split.

    Args:
        ids: (n,) unique ids.
        shard_rows: rows a shard; default n / 200, at least 32 and at most 2,048.

    Returns:
        Index arrays into `ids`; together they hold every row once.
    """
    n = len(ids)
    size = shard_rows or min(2048, max(32, n // 200))
    order = np.argsort(ids.astype(str), kind="stable") if n else np.zeros(0, dtype=np.int64)
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


def write_shard(folder: Path, number: int, id_hash: str, arrays: Arrays) -> None:
    """Write a shard and then its record; a crash between the two leaves a shard that doesn't count."""
    data = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_atomic(folder / f"{number:05d}.safetensors", data)
    record = {"sha256": digest(data), "ids": id_hash, "rows": len(next(iter(arrays.values())))}
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
