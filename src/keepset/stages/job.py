"""What the stages of a run share: the recipe, the run folder, and pool, target, tokens and model, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from keepset.data import Pool, Target, load_pool, load_target
from keepset.data.pool import Message
from keepset.data.turns import is_learnt
from keepset.data.words import count_words
from keepset.errors import DataError, RecipeError
from keepset.lazy import column, firsts
from keepset.memory import free_memory
from keepset.progress import track
from keepset.recipe import ModelSpec, Recipe
from keepset.row_ids import Ids
from keepset.runfolder import layout
from keepset.runfolder.files import canonical, digest_list, write_atomic
from keepset.runfolder.run import Run
from keepset.stages.encoded import Aim
from keepset.stages.encoding import Tokens, tokens_of
from keepset.stages.rows import Rows, Texts

if TYPE_CHECKING:
    from keepset.model.encode import Encoded, Encoder
    from keepset.model.load import Loaded

    Pair = tuple[Encoded, Encoded | None]


T = TypeVar("T")


class Job:
    """One recipe at work in one run folder."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        console: Console | None = None,
        force: bool = False,
        text_only: bool = False,
        worker: bool = False,
    ) -> None:
        """Adopt the recipe in its run folder (see `Run.adopt` for what is refused).

        Progress goes to `console` (default: standard error). `force` goes on in a folder made by another recipe.
        `text_only` never loads a tokenizer; lengths are counted in words. A `worker` takes part in the work of the
        process that adopted the recipe.
        """
        self.recipe = recipe
        self.held: dict[str, Loaded] = {}
        self._aims: dict[int | None, Aim] = {}
        self._rows: dict[str, Rows] = {}
        self._made: dict[Any, Any] = {}
        self.text_only = text_only
        self.console = console or Console(stderr=True)
        self.worker = worker
        self.run = Run(recipe.run_dir, worker=worker)
        self.run.machine = lambda: self.machine
        if not worker:
            self.run.adopt(recipe, force=force)
        self.run.held = worker

    def say(self, text: str) -> None:
        """Print a line for the person at the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # -- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def pool(self) -> Pool:
        """The pool; its quarantine is counted on screen."""
        pool = load_pool(self.recipe.pool, strict=self.recipe.strict, folder=self.run.path / layout.WORK_FOLDER)
        copies = f", {pool.duplicates} exact copies" if pool.duplicates else ""
        self.say(f"pool: {pool.n_in} rows in = {len(pool)} read + {len(pool.quarantine)} quarantined{copies}")
        return pool

    @cached_property
    def target(self) -> Target:
        """The few-shot validation set.

        Raises:
            RecipeError: the recipe names none.
        """
        if not self.recipe.target:
            raise RecipeError(
                "target: this method needs validation rows or pairs; add `target:` to the recipe, or give --target"
            )
        target = load_target(self.recipe.target, seed=self.recipe.seed, strict=self.recipe.strict)
        self.say(f"target: {len(target)} rows in {len(set(target.tasks))} tasks, {len(target.quarantine)} quarantined")
        if len(target) == 0:
            raise DataError(f"{self.recipe.target[0].path}: no usable target row")
        return target

    def aim(self, shots: int | None = None) -> Aim:
        """The target, or the draw that `shots` in a recipe's target makes of it."""
        if shots not in self._aims:
            target = self.target if shots is None else self.target.shots(shots, self.recipe.seed)
            self._aims[shots] = Aim(target, self, shots)
        return self._aims[shots]

    # -- model and tokens ---------------------------------------------------------------------------------------

    @property
    def loaded(self) -> Loaded:
        """The scoring model, without an adapter; loaded again where it was released."""
        from keepset.model.load import load

        if "model" not in self.held:
            self.say(f"model: {self.recipe.model.model_name_or_path}")
            self.held["model"] = load(self.recipe.model)
        return self.held["model"]

    @cached_property
    def fingerprint(self) -> str:
        """The scoring model's (see `Loaded`), known also while it isn't in memory."""
        return self.loaded.fingerprint

    def release(self) -> None:
        """Let the scoring model go: whoever trains, or runs another whole model, loads one of its own."""
        if "model" in self.held:
            _ = self.fingerprint
        self.held.clear()
        free_memory()

    @contextmanager
    def instead(self, spec: ModelSpec) -> Iterator[Loaded]:
        """Hold another whole model of the same shape in the scoring model's place, so that one is in memory."""
        from keepset.model.load import load

        _ = self.fingerprint
        self.release()
        self.held["model"] = load(spec)
        try:
            yield self.held["model"]
        finally:
            self.release()

    @cached_property
    def machine(self) -> dict[str, str]:
        """What numbers are made with here: device, dtype and libraries, which all may round differently."""
        from keepset.model.load import machine

        return machine(self.recipe.model)

    @cached_property
    def encoder(self) -> Encoder:
        """The scoring model's tokenizer and template."""
        from keepset.model.encode import Encoder
        from keepset.model.load import load_tokenizer

        return Encoder(load_tokenizer(self.recipe.model), self.recipe.model)

    @cached_property
    def sides(self) -> tuple[np.ndarray, Sequence[tuple[Encoded, ...]]]:
        """Indices (n,) of the pool's usable rows and the tokens of their sides, read when they are asked for.

        A row has one side; of a pool of pairs two, chosen and rejected, and both must be usable.

        Raises:
            DataError: no row is usable.
            RecipeError: a section trains on pairs and the pool has none.
        """
        from keepset.model.encode import loss_words

        read = self.encoded
        cut = read.truncated
        note = f", {cut} of them cut at max_length {self.recipe.model.max_length}" if cut else ""
        self.say(f"tokens: {len(self.pool)} rows = {len(read)} usable + {read.refused} quarantined{note}")
        for line in loss_words(read.lost()):
            self.say(line)
        first = next(self.refused(), None)
        if first and self.recipe.strict:
            raise DataError(f"{first['file']}:{first['line']}: {first['reason']}: {first['detail']}")
        if first and not len(read):
            raise DataError(f"no row of the pool is usable: {first['reason']}: {first['detail']}")
        return read.usable, read

    @cached_property
    def encoded(self) -> Tokens:
        """The pool's tokens as they lie in the run folder."""
        for name in ("train", "reference", "warmup"):
            loss = getattr(self.recipe, name).loss
            if loss != "sft" and not self.pool.has_pairs:
                raise RecipeError(f"{name}.loss: {loss} trains on pairs; set `pairs: true` on the pool")
        return tokens_of(self)

    @property
    def tokens(self) -> tuple[np.ndarray, Sequence[Encoded]]:
        """Indices (n,) of the pool's usable rows and their tokens (of a pair: the chosen side's)."""
        return self.sides[0], column(self.sides[1], 0)

    @property
    def reads(self) -> tuple[str, ...]:
        """The folder of the tokens, where they are known: a task that looks at rows reads it."""
        return (self.encoded.folder,) if "encoded" in self.__dict__ and not self.text_only else ()

    def refused(self) -> Iterator[dict[str, Any]]:
        """A quarantine entry for each row of the pool that has no tokens."""
        for index, reason, detail in self.encoded.refusals():
            row = self.pool.table.slice(index, 1).to_pylist()[0]
            yield {"file": row["file"], "line": row["line"], "reason": reason, "detail": detail,
                   "excerpt": row["raw"][:200], "id": row["id"]}  # fmt: skip

    def save_quarantine(self) -> None:
        """Write `quarantine.jsonl`: every row that was read but not used, with file, line and reason.

        Call with the run folder locked.
        """

        def write(file: IO[bytes]) -> None:
            for entry in chain(map(asdict, self.pool.quarantine), () if self.text_only else self.refused()):
                file.write((canonical(entry) + "\n").encode("utf-8", "replace"))

        write_atomic(self.run.path / layout.QUARANTINE, write)

    @property
    def usable(self) -> np.ndarray:
        """Indices (n,) into the pool of the rows that are scored; without a tokenizer, all of them."""
        return self._all if self.text_only else self.sides[0]

    @cached_property
    def _all(self) -> np.ndarray:
        return np.arange(len(self.pool))

    @cached_property
    def ids(self) -> Ids:
        """(n,) ids of the usable rows; an array of str to whoever reads it."""
        return self.pool.ids if len(self.usable) == len(self.pool) else self.pool.ids[self.usable]

    @cached_property
    def ids_digest(self) -> str:
        """Hash of the usable rows' ids in their order."""
        return digest_list(self.ids)

    @property
    def rows(self) -> Sequence[Encoded]:
        """The usable rows' tokens."""
        return self.tokens[1]

    @property
    def length_unit(self) -> str:
        """What `n_tokens` counts."""
        return "words" if self.text_only else "tokens"

    def n_tokens(self) -> np.ndarray:
        """(n,) supervised tokens of each usable row, both sides of a pair; words of the answers without a tokenizer."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        if not self.text_only:
            _ = self.sides
            return self.encoded.counts()[1].sum(axis=1, dtype=np.int64)
        rows: Iterable[list[Message]] = self.pool.all_messages()
        if self.pool.has_pairs:
            rows = (chosen + rejected for _, chosen, rejected in self.pool.all_pairs())
        return count_words("\n".join(m["content"] for m in row if is_learnt(m)) for row in rows)

    def texts(self) -> Texts:
        """The usable rows as plain text, all messages joined by line breaks; read when they are asked for."""
        return Texts(self.pool, self.usable)

    @property
    def target_pairs(self) -> tuple[list[Pair], np.ndarray]:
        """The target's usable rows as tokens, and their indices in the target."""
        return self.aim().pairs, self.aim().kept

    def once_a_recipe(self, what: Hashable, make: Callable[[], T]) -> T:
        """Remember what `make` returns for as long as the recipe stays the same."""
        key = what, self.recipe.model_dump_json()
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    # -- what stages look at --------------------------------------------------------------------------------------

    @property
    def pair_gradients(self) -> bool:
        """Whether a row's gradient is that of a preference loss: a pool of pairs, chosen from for such a training."""
        return self.pool.has_pairs and self.recipe.train.loss != "sft"

    def rows_of(self, what: str) -> Rows:
        """The usable rows as a stage looks at them.

        Args:
            what: `chosen` (of rows that are no pairs: the row), `rejected`, `content` (chosen without the ends of
                turns), `alone` (the chosen answer after a single BOS or EOS token), `gradients` (the sides whose
                gradients are formed, cut after `gradients.max_completion_tokens`), `texts`.
        """
        if what not in self._rows:
            self._rows[what] = self._look(what)
        return self._rows[what]

    def _look(self, what: str) -> Rows:
        data = self.pool.fingerprint()
        if what == "texts":
            return Rows(self.ids, self.texts(), data)
        if what == "gradients":
            sides = self.sides[1] if self.pair_gradients else firsts(self.sides[1])
            return Rows(self.ids, sides, data).first_supervised(self.recipe.gradients.max_completion_tokens)
        chosen = Rows(self.ids, self.rows, data)
        if what == "content":
            return chosen.content_only(self.encoded.column("n_ends")[:, 0])
        if what == "alone":
            tokenizer = self.encoder.tokenizer
            return chosen.alone(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        return Rows(self.ids, column(self.sides[1], 1), data) if what == "rejected" else chosen

    def data_key(self) -> dict[str, Any]:
        """What every feature's key holds: model, template and data."""
        return {"model": self.fingerprint, "encoder": self.encoder.fingerprint, "pool": self.pool.fingerprint()}

    def tracked(self, what: str, total: int, unit: str = "rows", there: int = 0) -> Any:
        """A progress bar on this job's console; `there` of the units are done already."""
        return track(self.console, what, total, unit, there)
