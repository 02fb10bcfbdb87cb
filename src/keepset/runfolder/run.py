"""The run folder: everything a run knows, on disk, in a form that survives kill -9. The only module that keeps state.

Work is cut into shards that depend on the rows' ids alone. A shard is written to a temporary file, fsynced, renamed and
then recorded with its checksum; it counts only if record and checksum fit. Starting the same command again therefore
computes what is missing and nothing else, and the result has the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from keepset.errors import KeepsetError, PlanMismatch, RecipeError
from keepset.keys import diff_keys
from keepset.located import located
from keepset.recipe import Recipe
from keepset.row_ids import Ids
from keepset.runfolder import layout
from keepset.runfolder.claims import Claims
from keepset.runfolder.costs import Meter
from keepset.runfolder.files import canonical, digest, file_digest, json_text, misfits, write_atomic
from keepset.runfolder.lock import is_free, locked, refuse_links
from keepset.runfolder.shards import Arrays, Kept, Shards, find_shard, stage_folder, write_shard
from keepset.runfolder.tables import read_table, write_changed, write_table


class Run:
    """A run folder, locked while open."""

    def __init__(self, path: str | Path, *, worker: bool = False) -> None:
        """Open (and create) the folder; nothing is written before `lock` or a save.

        Args:
            path: the folder.
            worker: another process leads the run.

        Attributes:
            lenders: other run folders whose shards (of the same stage, key and rows) and finished steps (of the same
                key) are copied, not made again.
            machine: gives what shards are made with here, for their records.
            claims: of this process, where several work on the folder; what one of them makes, the others don't.
            wait: whether it waits for what another one makes; else `Busy` is raised.
            held: whether this process may write: it has locked the folder, or works for the process that has.
        """
        self.path = Path(path)
        self.held = False
        self.lenders: list[Path] = []
        self.meter = Meter(self.path, worker=worker)
        self.machine: Callable[[], Mapping[str, str]] | None = None
        self.claims: Claims | None = None
        self.wait = True

    # -- the recipe ---------------------------------------------------------------------------------------------

    def adopt(self, recipe: Recipe, *, force: bool = False) -> None:
        """Make `recipe` the folder's own, or check that it is.

        Methods, variants, workers, executor, the headline and what is validated may change freely; any other difference
        from the stored recipe is refused.

        Raises:
            PlanMismatch: the folder was made by another recipe; the message lists what differs.
            KeepsetError: another process works in the folder, or it can't be written.
        """
        path = self.path / layout.RECIPE
        new = recipe.model_dump(mode="json", exclude={"run_dir"})
        go_on = path.exists() and not force
        if go_on:
            try:  # a key that an older keepset didn't know has its default
                stored = self._parsed().model_dump(mode="json", exclude={"run_dir"})
                here = Path.cwd()  # the same file may be called otherwise from another folder
                old, ours = (located(r, here, real=True).model_dump(mode="json", exclude={"run_dir"})
                             for r in (self.recipe(), recipe))  # fmt: skip
            except RecipeError:  # it knew one that is gone
                stored = old = self.recipe_data()
                old.pop("run_dir", None)
                ours = new
            # they change no number that is there
            free = ("methods", "variants", "batching.workers:", "executor.", "validate", "evaluate.headline")
            differences = [d for d in diff_keys(old, ours) if not d.startswith(free)]
            if differences:
                shown = "; ".join(differences[:4]) + (
                    f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
                )
                raise PlanMismatch(
                    f"{self.path} was made by another recipe ({shown}); use another --run_dir, "
                    "or --force to go on here: what still fits is kept, the rest is redone"
                )
            new = {**stored, **{key: new[key] for key in ("methods", "variants", "batching", "executor", "validate")}}
            new["evaluate"] = {**stored["evaluate"], "headline": recipe.evaluate.headline}
        text = yaml.safe_dump(new, sort_keys=False, allow_unicode=True).encode()
        if not path.exists() or path.read_bytes() != text:
            with self.lock():  # refused while another process works in the folder
                if not go_on:
                    seen_from = os.path.relpath(os.getcwd(), os.path.realpath(self.path))
                    write_atomic(self.path / layout.SEEN_FROM, seen_from.encode("utf-8", "surrogateescape"))
                write_atomic(path, text)

    def recipe_data(self) -> dict[str, Any]:
        """The stored recipe as it stands in the file.

        Raises:
            KeepsetError: the file is damaged.
        """
        path = self.path / layout.RECIPE
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise KeepsetError(f"{path}: damaged (not a YAML mapping); delete it and run the same command again")
        return data

    def recipe(self) -> Recipe:
        """The stored recipe; what it names by relative paths is found from any folder.

        Raises:
            KeepsetError: this is no run folder.
        """
        recipe, folder = self._parsed(), self.seen_from()
        away = folder is not None and os.path.realpath(folder) != os.path.realpath(os.getcwd())
        return located(recipe, folder) if folder is not None and away else recipe

    def seen_from(self) -> Path | None:
        """The folder that the stored recipe's paths are relative to; None in a run folder of an older keepset."""
        try:
            text = (self.path / layout.SEEN_FROM).read_bytes().decode("utf-8", "surrogateescape")
        except OSError:
            return None
        return Path(os.path.normpath(os.path.join(os.path.realpath(self.path), text)))

    def _parsed(self) -> Recipe:
        from keepset.recipe import parse_recipe

        path = self.path / layout.RECIPE
        if not path.exists():
            raise KeepsetError(
                f"{self.path} is no run folder (it has no recipe.yaml); start with `keepset run` or `score`"
            )
        data = self.recipe_data()
        data["run_dir"] = str(self.path)
        return parse_recipe(data, where=str(path), stored=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; with claims it is a claim that tells the worker that leads.

        Raises:
            KeepsetError: another process works in it, or it can't be written.
        """
        refuse_links(self.path)
        before = self.held
        with nullcontext() if self.claims is not None else locked(self.path):
            self.meter.settle()
            self.held = True
            try:
                yield
            finally:
                self.held = before

    def is_free(self) -> bool:
        """Whether no process without claims holds the folder."""
        return is_free(self.path)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, name: str, data: bytes, key: str | None = None) -> Path:
        """Write a file atomically and remember its checksum in `work/records/`, so that damage is found later.

        The record is written first and knows the file before and after: a crash between the two leaves no file that
        looks damaged. `key` is the hash of what the content was made of (see `saved_key`); default: the key it has.
        """
        self._record(name, digest(data), key)
        write_atomic(self.path / name, data)
        return self.path / name

    def _record(self, name: str, sha256: str, key: str | None) -> None:
        old = self._entry(name)
        kept = old["key"] if old else None
        entries = [{"sha256": sha256, "key": key if key is not None else kept}, *([old] if old else [])]
        write_atomic(self.path / layout.record(name), canonical(entries).encode())

    def _entry(self, name: str) -> dict[str, Any] | None:
        """The record's entry that fits the file as it is; None without file, record or fit."""
        try:
            entries = json.loads((self.path / layout.record(name)).read_text(encoding="utf-8"))
            sha256 = file_digest(self.path / name)
            return next((e for e in entries if e["sha256"] == sha256 and "key" in e), None)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def saved_key(self, name: str) -> str | None:
        """The key that a file was saved with; None if there is no such file, or it is not as it was saved."""
        entry = self._entry(name)
        return entry["key"] if entry else None

    def check(self, name: str) -> None:
        """Check a file against the record of its checksum, where there is one.

        Raises:
            KeepsetError: it is not as it was saved.
        """
        record = self.path / layout.record(name)
        if (self.path / name).exists() and record.exists() and self._entry(name) is None:
            raise KeepsetError(
                f"{self.path / name}: damaged, or changed by other hands (its checksum doesn't fit); delete it and run "
                "the same command again"
            )

    def save_json(self, name: str, value: Any) -> Path:
        """Write a JSON file (see `save`); NaN and infinities are null."""
        return self.save(name, (json_text(value, indent=1) + "\n").encode())

    def load_json(self, name: str, default: Any = None) -> Any:
        """Read a JSON file of the folder, or return `default` if there is none.

        Raises:
            KeepsetError: the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return default
        self.check(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise KeepsetError(f"{path}: damaged (not JSON); delete it and run the same command again") from None

    def save_table(self, name: str, table: pa.Table, key: str | None = None, *, solid: bool = False) -> Path:
        """Write a Parquet file (see `save` and `tables.write_table`)."""
        write_atomic(
            self.path / name, partial(write_table, table=table, solid=solid),
            lambda part: self._record(name, file_digest(part), key),
        )  # fmt: skip
        return self.path / name

    def change_table(self, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
        """Change a Parquet file of the folder a row group at a time; it keeps its key.

        Raises:
            KeepsetError: it is missing or damaged.
        """
        self.load_table(name, lambda column: False)  # refused where it is damaged
        write = partial(write_changed, path=self.path / name, change=change)
        write_atomic(self.path / name, write, lambda part: self._record(name, file_digest(part), None))

    def load_table(self, name: str, wanted: Callable[[str], bool] | None = None) -> pa.Table:
        """Read a Parquet file of the folder, or the columns whose names are wanted.

        Raises:
            KeepsetError: it is missing or damaged.
        """
        path = self.path / name
        self.check(name)
        try:
            return read_table(path, wanted)
        except FileNotFoundError:
            have = sorted(p.stem for p in path.parent.glob("*.parquet"))
            raise KeepsetError(
                f"{path}: not there; {path.parent.name} has: {', '.join(have) or 'nothing yet'}"
            ) from None
        except (pa.ArrowException, OSError):  # Arrow tells a block that can't be unpacked as an OSError
            raise KeepsetError(f"{path}: damaged (not Parquet); delete it and run the same command again") from None

    # -- what is computed once ------------------------------------------------------------------------------------

    def once(self, name: str, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Arrays that are no rows of the pool (target vectors), kept on disk as one shard of a stage of their own."""
        folder, of = stage_folder(self.path, name, key), digest(key)
        arrays = find_shard(self.path, folder, 0, of, self.lenders)
        if arrays is not None:
            return arrays
        with self.alone(str(folder.relative_to(self.path))):
            arrays = find_shard(self.path, folder, 0, of, self.lenders)  # whoever had the claim may have made it
            if arrays is None:
                write_atomic(folder / layout.KEY, canonical(key).encode())
                arrays = compute()
                write_shard(folder, 0, of, arrays, None if self.machine is None else self.machine())
                self.meter.note()
        return arrays

    def alone(self, name: str, *, fatal: bool = False) -> AbstractContextManager[None]:
        """Let no other worker do the same meanwhile; see `Claims.holding`."""
        return nullcontext() if self.claims is None else self.claims.holding(name, wait=self.wait, fatal=fatal)

    def has(self, kept: Kept) -> bool:
        """Whether a result is there, whole and of this key."""
        if kept.step:
            return self.whole(kept.folder, kept.key) is not None
        return find_shard(self.path, self.path / kept.folder, 0, digest(kept.key), self.lenders) is not None

    def shards(
        self, stages: Mapping[str, Mapping[str, Any]], ids: Ids | np.ndarray, shard_rows: int | None = None
    ) -> Shards:
        """The shards of some stages (name -> key) over rows with these ids; see `Shards`."""
        return Shards(self.path, stages, ids, shard_rows, self.lenders, self.machine)

    # -- steps that end in a folder (training) --------------------------------------------------------------------

    def step(self, folder: str, key: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Do a step whose product is a folder, unless it was done with the same key and its files are whole.

        `work(path)` fills the folder and returns facts to remember (seconds, tokens ...); they come back on a re-run.
        """
        record = self.whole(folder, key)
        if record is None:
            with self.alone(folder, fatal=True):
                record = self.whole(folder, key)  # whoever had the claim may have done it
                if record is None:
                    return {**self._do(folder, key, work), "reused": False}
        return {**record["facts"], "reused": True}

    def whole(self, folder: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a step that was done with this key and whose files are whole; a lender's is copied."""
        path = self.path / folder
        record = self.done(folder)
        if record and record["key"] == digest(key) and not misfits(path, record["files"]):
            return record
        for lender in self.lenders:
            lent = Run(lender).done(folder)
            if lent and lent["key"] == digest(key) and not misfits(lender / folder, lent["files"]):
                for name in lent["files"]:
                    write_atomic(path / name, (lender / folder / name).read_bytes())
                self.save_json(layout.done(folder), lent)
                return lent
        return None

    def _do(self, folder: str, key: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        path = self.path / folder
        (path / layout.DONE).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        facts = dict(work(path))
        files = {
            str(p.relative_to(path)): file_digest(p)
            for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != layout.DONE and p.suffix in {".safetensors", ".json"}
        }
        self.save_json(layout.done(folder), {"key": digest(key), "facts": facts, "files": files, "inputs": dict(key)})
        return facts

    def done(self, folder: str) -> dict[str, Any] | None:
        """A step's record; None if it wasn't finished, or the record is damaged."""
        try:
            record = self.load_json(layout.done(folder))
        except KeepsetError:
            return None
        if not isinstance(record, dict) or not {"key", "facts", "files"} <= record.keys():
            return None
        return record if isinstance(record["facts"], dict) and isinstance(record["files"], dict) else None

    def require_whole(self, folder: str) -> None:
        """Check a finished step's files, before they are used outside `step`.

        Raises:
            KeepsetError: it wasn't finished, or a file is damaged; the message names it.
        """
        record = self.done(folder)
        if record is None:
            raise KeepsetError(f"{self.path / folder}: not finished, or its done.json is damaged; make it again")
        for name in misfits(self.path / folder, record["files"]):
            raise KeepsetError(
                f"{self.path / folder / name}: missing or damaged (its checksum doesn't fit); make it again"
            )

    # -- costs --------------------------------------------------------------------------------------------------

    def timed(self, stage: str, **facts: Any) -> AbstractContextManager[dict[str, Any]]:
        """Append what a stage cost (seconds, tokens, FLOPs, rows) to `costs.jsonl`; see `Meter.timed`."""
        return self.meter.timed(stage, **facts)

    def costs(self) -> list[dict[str, Any]]:
        """All entries of `costs.jsonl`."""
        return self.meter.entries()
