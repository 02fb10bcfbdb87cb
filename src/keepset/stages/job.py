"""What the stages of a run share: the recipe, the run folder, and pool, target, tokens and model, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console

from keepset.data import Pool, Target, load_pool, load_target
from keepset.data.pool import Message
from keepset.data.turns import is_learnt
from keepset.data.words import count_words
from keepset.errors import DataError, RecipeError
from keepset.memory import free_memory
from keepset.progress import track
from keepset.recipe import ModelSpec, Recipe
from keepset.runfolder import layout
from keepset.runfolder.files import canonical, digest, write_atomic
from keepset.runfolder.run import Run
from keepset.stages.encoded import Aim, encode_pool
from keepset.stages.rows import Rows

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

    def say(self, text: str) -> None:
        """Print a line for the person at the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # -- data ---------------------------------------------------------------------------------------------------

    @cached_property
    def pool(self) -> Pool:
        """The pool; its quarantine is counted on screen."""
        pool = load_pool(self.recipe.pool, strict=self.recipe.strict)
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
    def sides(self) -> tuple[np.ndarray, list[tuple[Encoded, ...]]]:
        """Indices (n,) of the pool's usable rows and the tokens of their sides.

        A row has one side; of a pool of pairs two, chosen and rejected, and both must be usable.

        Raises:
            DataError: no row is usable.
            RecipeError: a section trains on pairs and the pool has none.
        """
        from keepset.model.encode import what_is_lost

        rows, refused = self.encoded
        usable = [i for i, row in enumerate(rows) if row is not None]
        cut = sum(any(side.truncated for side in rows[i] or ()) for i in usable)
        note = f", {cut} of them cut at max_length {self.recipe.model.max_length}" if cut else ""
        self.say(f"tokens: {len(rows)} rows = {len(usable)} usable + {len(refused)} quarantined{note}")
        for line in what_is_lost(side for i in usable for side in rows[i] or ()):
            self.say(line)
        if refused and self.recipe.strict:
            first = refused[0]
            raise DataError(f"{first['file']}:{first['line']}: {first['reason']}: {first['detail']}")
        if not usable:
            raise DataError(f"no row of the pool is usable: {refused[0]['reason']}: {refused[0]['detail']}")
        return np.array(usable), [rows[i] for i in usable]  # type: ignore[misc]

    @cached_property
    def encoded(self) -> tuple[list[tuple[Encoded, ...] | None], list[dict[str, Any]]]:
        """The sides of each of the pool's rows as tokens, None where one is refused, and the refusals."""
        for name in ("train", "reference", "warmup"):
            loss = getattr(self.recipe, name).loss
            if loss != "sft" and not self.pool.has_pairs:
                raise RecipeError(f"{name}.loss: {loss} trains on pairs; set `pairs: true` on the pool")
        rows, refused = encode_pool(self.pool, self.encoder)
        return rows, [self.refusal(index, reason, detail) for index, reason, detail in refused]

    @cached_property
    def tokens(self) -> tuple[np.ndarray, list[Encoded]]:
        """Indices (n,) of the pool's usable rows and their tokens (of a pair: the chosen side's)."""
        return self.sides[0], [row[0] for row in self.sides[1]]

    def refusal(self, index: int, reason: str, detail: str) -> dict[str, Any]:
        """A quarantine entry for row `index` of the pool."""
        row = self.pool.table.slice(index, 1).to_pylist()[0]
        return {"file": row["file"], "line": row["line"], "reason": reason, "detail": detail,
                "excerpt": row["raw"][:200], "id": row["id"]}  # fmt: skip

    def save_quarantine(self) -> None:
        """Write `quarantine.jsonl`: every row that was read but not used, with file, line and reason.

        Call with the run folder locked.
        """
        entries = [asdict(q) for q in self.pool.quarantine] + ([] if self.text_only else self.encoded[1])
        write_atomic(
            self.run.path / layout.QUARANTINE, "".join(canonical(e) + "\n" for e in entries).encode("utf-8", "replace")
        )

    @property
    def usable(self) -> np.ndarray:
        """Indices (n,) into the pool of the rows that are scored; without a tokenizer, all of them."""
        return np.arange(len(self.pool)) if self.text_only else self.tokens[0]

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) ids of the usable rows."""
        return self.pool.ids[self.usable]

    @cached_property
    def ids_digest(self) -> str:
        """Hash of the usable rows' ids in their order."""
        return digest([str(i) for i in self.ids])

    @property
    def rows(self) -> list[Encoded]:
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
            return np.array([sum(int(side.supervised.sum()) for side in row) for row in self.sides[1]])
        rows: Iterable[list[Message]] = self.pool.all_messages()
        if self.pool.has_pairs:
            rows = (chosen + rejected for _, chosen, rejected in self.pool.all_pairs())
        return count_words("\n".join(m["content"] for m in row if is_learnt(m)) for row in rows)

    def texts(self) -> list[str]:
        """The usable rows as plain text, all messages joined by line breaks."""
        texts = ["\n".join(m["content"] for m in row) for row in self.pool.all_messages()]
        return [texts[i] for i in self.usable]

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
            sides = self.sides[1] if self.pair_gradients else [row[:1] for row in self.sides[1]]
            return Rows(self.ids, sides, data).first_supervised(self.recipe.gradients.max_completion_tokens)
        chosen = Rows(self.ids, self.rows, data)
        if what == "content":
            return chosen.content_only()
        if what == "alone":
            tokenizer = self.encoder.tokenizer
            return chosen.alone(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        return Rows(self.ids, [row[1] for row in self.sides[1]], data) if what == "rejected" else chosen

    def data_key(self) -> dict[str, Any]:
        """What every feature's key holds: model, template and data."""
        return {"model": self.fingerprint, "encoder": self.encoder.fingerprint, "pool": self.pool.fingerprint()}

    def tracked(self, what: str, total: int, unit: str = "rows") -> Any:
        """A progress bar on this job's console."""
        return track(self.console, what, total, unit)
