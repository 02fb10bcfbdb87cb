"""`keepset reproduce manifest.json`: run the manifest's recipe again in a new folder and say what came out the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepset.deliver.finish import run_recipe
from keepset.errors import KeepsetError
from keepset.evaluate.statistics import spearman
from keepset.located import located
from keepset.recipe import Recipe, parse_recipe
from keepset.runfolder import layout
from keepset.runfolder.run import Run


@dataclass(frozen=True)
class Checked:
    """One thing that two runs of a recipe are compared in; `note` says how far they differ."""

    what: str
    equal: bool
    note: str


@dataclass(frozen=True)
class Reproduction:
    """What two runs of a recipe have in common; `versions`: name -> (then, now) where they differ."""

    equal: bool
    rows: list[Checked]
    versions: dict[str, tuple[str | None, str | None]]
    run_dir: str


def load_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest; a run folder stands for the one in it.

    Raises:
        KeepsetError: there is none, or it isn't one.
    """
    path = path / layout.MANIFEST if path.is_dir() else path
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeepsetError(f"{path}: no such manifest; `keepset run` writes one when it is done") from None
    except (OSError, ValueError, RecursionError):
        raise KeepsetError(f"{path}: can't be read as JSON; give a run folder's manifest.json") from None
    if not (isinstance(manifest, dict) and {"recipe", "pool", "files", "subsets"} <= manifest.keys()):
        raise KeepsetError(f"{path}: not a manifest of `keepset run`")
    return manifest


def recipe_of(manifest: dict[str, Any], folder: Path, run_dir: Path) -> Recipe:
    """The manifest's recipe for a new folder; paths are those of the run, or, not found from here, of the manifest.

    Raises:
        RecipeError: the recipe is of another version and can't be read.
    """
    data = json.loads(json.dumps(manifest["recipe"])) if isinstance(manifest["recipe"], dict) else manifest["recipe"]
    data = {**data, "run_dir": str(run_dir)} if isinstance(data, dict) else data
    recipe = parse_recipe(data, where="manifest", stored=True)
    own = Run(folder).seen_from()
    if own is not None and own.resolve() != Path.cwd():
        recipe = located(recipe, own)
    return located(recipe, folder, here_first=True)


def reproduce(manifest_path: Path, run_dir: Path, *, console: Console | None = None) -> Reproduction:
    """Run a manifest's recipe in `run_dir` and compare hashes.

    The manifest may be named by its run folder; `run_dir` must not be that folder.

    Raises:
        KeepsetError: no manifest, the same folder, or anything `keepset run` refuses.
    """
    manifest = load_manifest(manifest_path)
    folder = manifest_path if manifest_path.is_dir() else manifest_path.parent
    if run_dir.resolve() == folder.resolve():
        raise KeepsetError(f"{run_dir}: that is the run itself; name another --run_dir to run it again in")
    quiet = Console(quiet=True)
    run_recipe(recipe_of(manifest, folder, run_dir), console=console, out=quiet)
    return compare_manifests(manifest, load_manifest(run_dir), folder, run_dir)


def compare_manifests(then: dict[str, Any], now: dict[str, Any], old: Path, new: Path) -> Reproduction:
    """Compare two runs' manifests; `old` and `new` are their folders."""
    rows: list[Checked] = []

    def add(what: str, before: Any, after: Any, note: str = "") -> None:
        rows.append(Checked(what, before == after, "" if before == after else note))

    for name in ("fingerprint", "usable", "quarantined"):
        before, after = then["pool"].get(name), now["pool"].get(name)
        add(f"pool: {name}", before, after, f"{str(before)[:12]}, now {str(after)[:12]}")
    for name in sorted({*(then.get("model") or {}), *(now.get("model") or {})}):
        add(f"model: {name}", (then.get("model") or {}).get(name), (now.get("model") or {}).get(name), "other files")
    for name in sorted({*then["subsets"], *now["subsets"]}):
        before, after = (m["subsets"].get(name, {}).get("ids") for m in (then, now))
        add(f"chosen rows: {name}", before, after, shared(before, after))
    for name in sorted({*then["files"], *now["files"]}):
        before, after = then["files"].get(name), now["files"].get(name)
        note = "not there then" if before is None else "not there now" if after is None else likeness(old, new, name)
        add(name, before, after, note)
    before, after = then.get("versions", {}), now.get("versions", {})
    versions = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}
    changed = {name: pair for name, pair in versions.items() if pair[0] != pair[1]}
    return Reproduction(all(row.equal for row in rows), rows, changed, str(new))


def shared(before: list[str] | None, after: list[str] | None) -> str:
    """How many chosen rows two lists of ids share."""
    if before is None or after is None:
        return "not there then" if before is None else "not there now"
    both = len(set(before) & set(after))
    order = ", in another order" if both == len(before) == len(after) else ""
    return f"{both} of {max(len(before), len(after))} rows in common{order}"


def likeness(old: Path, new: Path, name: str) -> str:
    """How far two score files that differ agree; other files only differ."""
    if not name.startswith(f"{layout.SCORES_FOLDER}/"):
        return "other bytes"
    try:
        tables = [Run(folder).load_table(name).select(["id", "score"]).to_pydict() for folder in (old, new)]
    except KeepsetError:
        return "other bytes (the first run's file isn't there to compare with)"
    first, second = (dict(zip(t["id"], t["score"], strict=True)) for t in tables)
    both = [i for i in first if first[i] is not None and second.get(i) is not None]
    a, b = np.array([first[i] for i in both]), np.array([second[i] for i in both])
    if len(both) < 3:
        return "other bytes"
    scale = float(np.abs(a).max()) or 1.0
    return f"rank correlation {spearman(a, b):.6f}, largest difference {np.abs(a - b).max() / scale:.1e} of the largest"


def print_reproduction(result: Reproduction, console: Console) -> None:
    """Print what is equal and what isn't, and the versions that changed."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("what", "", "note"):
        table.add_column(name)
    for row in result.rows:
        table.add_row(Text(row.what), "equal" if row.equal else Text("differs", style="red"), Text(row.note))
    console.print(table)
    for name, (before, after) in result.versions.items():
        console.print(f"version of {name}: {before}, now {after}", highlight=False)
    same = sum(row.equal for row in result.rows)
    console.print(f"{same} of {len(result.rows)} equal; the new run: {result.run_dir}", highlight=False)
