"""From one data section to its files, and from a file to its raw rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import pyarrow as pa

from keepset.data.jsonfiles import RawRow, read_json
from keepset.data.reasons import FileRefused, Quarantined
from keepset.data.streams import open_bytes
from keepset.data.tables import Batches, open_arrow, open_hub, open_parquet, read_csv, saved_dataset_files, table_rows

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_UNREAD = (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".xlsx")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One file's rows on their way: where from, which container; if it is Arrow's, its schema and its rows as such."""

    file: str
    container: str
    schema: pa.Schema | None
    rows: Iterator[RawRow | Quarantined]
    batches: Batches | None = None


def stem(path: str) -> str:
    """Return a data file's name without folder and suffixes: `a/b.jsonl.zst` -> `b`; `-` -> `stdin`."""
    if path == "-":
        return "stdin"
    name = Path(path).name.split(":")[0] or Path(path).resolve().name
    for suffix in (*_PACKED, *SUFFIXES):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
    return name


def is_data_file(name: str) -> bool:
    """Tell from its name whether keepset reads this file when it stands in a folder."""
    lowered = name.lower()
    for suffix in _PACKED:
        lowered = lowered.removesuffix(suffix)
    return lowered.endswith(SUFFIXES) and not name.startswith((".", "_")) and name not in _ABOUT


def open_all(path: str, split: str) -> Iterator[OpenFile]:
    """Open what a data section's `path` names, file by file: a file, `-`, a folder, a saved dataset or a hub name.

    Raises:
        FileRefused: there is nothing that can be read; the message names what is near.
    """
    place = Path(path)
    if path == "-" or place.is_file():
        yield open_one(path)
    elif place.is_dir():
        saved = saved_dataset_files(place, split)
        for file in saved if saved is not None else folder_files(place, split):
            yield open_one(file)
    elif _HUB.fullmatch(path) and not is_data_file(path):
        yield _arrow(path, "hub", *open_hub(path, split))
    else:
        raise FileRefused(path, "no-such-file", f"no such file or folder{_near(place)}")


def open_one(path: str) -> OpenFile:
    """Open one file; the container goes by the content."""
    name = path if path != "-" else "<stdin>"
    stream, container = open_bytes(path)
    if container == "json":
        return OpenFile(name, _json_container(path), None, read_json(stream, name))
    if container == "csv":
        return OpenFile(name, "csv", None, read_csv(stream, name))
    if path == "-":
        raise FileRefused(name, "unknown-container", f"{container} can't be read from standard input; name the file")
    stream.close()
    return _arrow(name, container, *(open_parquet(path) if container == "parquet" else open_arrow(path)))


def _arrow(name: str, container: str, schema: pa.Schema, batches: Batches) -> OpenFile:
    return OpenFile(name, container, schema, table_rows(batches, name), batches)


def _json_container(path: str) -> str:
    lowered = path.lower()
    for suffix in _PACKED:
        lowered = lowered.removesuffix(suffix)
    return "json" if lowered.endswith(".json") else "jsonl"


def folder_files(folder: Path, split: str) -> list[str]:
    """Return a folder's data files in name order; those of `split` alone, if file or folder names tell splits apart.

    A `data/` folder inside, as hub datasets and keepset's run folders have it, goes before anything beside it.

    Raises:
        FileRefused: none is there, or none of this split.
    """
    root = folder / "data" if (folder / "data").is_dir() else folder
    files = _walk(root)
    if not files and root != folder:
        root, files = folder, _walk(folder)
    if not files:
        raise FileRefused(str(folder), "no-such-file", f"the folder holds no data files ({' '.join(SUFFIXES)})")
    unread = [p for p in root.rglob("*") if p.suffix.lower() in _UNREAD and p.is_file()]
    if unread:
        log.warning("%s: not read, as files of another kind: %s", folder, _names(unread, root))
    split_of = {file: name for file in files if (name := _split_of(file, root))}
    if not split_of:
        return [str(f) for f in files]
    asked = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "test"}.get(split, split)
    chosen = [str(f) for f in files if split_of.get(f) == asked]
    if not chosen:
        there = ", ".join(sorted(set(split_of.values())))
        raise FileRefused(str(folder), "no-such-file", f"the folder has no split '{split}'; there are: {there}")
    if len(split_of) < len(files):
        left = _names([file for file in files if file not in split_of], root)
        log.warning("%s: not read, since other names tell splits and these none: %s", folder, left)
    return chosen


def _names(files: list[Path], root: Path) -> str:
    names = [str(file.relative_to(root)) for file in sorted(files, key=str)]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _walk(root: Path) -> list[Path]:
    files = (p for p in root.rglob("*") if p.is_file() and is_data_file(p.name))
    return sorted((p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)), key=str)


def _split_of(file: Path, root: Path) -> str | None:
    words = re.split(r"[^A-Za-z]+", "/".join(file.relative_to(root).parts).lower())
    for name in _SPLITS:
        if name in words:
            return {"val": "validation", "valid": "validation", "dev": "validation", "eval": "test"}.get(name, name)
    return None


def _near(place: Path) -> str:
    try:
        names = [p.name for p in place.parent.iterdir()]
    except OSError:
        return f"; nor is there a folder '{place.parent}'" if str(place.parent) != "." else ""
    close = get_close_matches(place.name, names, n=1, cutoff=0.6)
    return f" (did you mean '{place.parent / close[0]}'?)" if close else ""
