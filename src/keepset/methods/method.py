"""What a method is: options as fields, the stages it takes, its formula on their arrays, how noise carries over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import numpy as np

from keepset.row_ids import Ids
from keepset.stages.stage import Stage, Sweep, fetch
from keepset.stages.trained import WarmupCheckpoint

if TYPE_CHECKING:
    from keepset.stages.job import Job

Cost = Literal["free", "text", "forward", "reference", "gradients", "retraining"]
Columns = Mapping[str, np.ndarray]

NOISE = 1e-6  # relative noise of a float32 loss: another batch shape changes it by 4e-8, measured


@dataclass(frozen=True)
class Scores:
    """A method's answer: `score` (n,), larger is better, and the columns (n,) that explain it."""

    score: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


def task_parts(names: list[str], per_task: np.ndarray) -> dict[str, np.ndarray]:
    """Columns `task.<name>` of a (n, j) array; (n, 0), a method that looks at no task, has none."""
    return {f"task.{name}": column for name, column in zip(names, per_task.T, strict=False)}


def signed(score: np.ndarray, prefer: str) -> np.ndarray:
    """Turn the sign for `prefer: low`, so that larger stays better."""
    return score if prefer == "high" else -score


class Features:
    """What a method is given: the values of its stages by name, and the rows' ids, texts, lengths and target."""

    def __init__(
        self,
        job: Job,
        stages: Mapping[str, Stage],
        shots: int | None = None,
        *,
        beside: Iterable[Stage] = (),
        rows: np.ndarray | None = None,
    ) -> None:
        """Nothing is computed before it is asked for.

        `shots` are the rows a task of the target that it looks at (None: all), `beside` other methods' stages, computed
        in the same passes where they can be, `rows` indices of the rows that a method without stages is to score (None:
        all).
        """
        self._job, self._shots, self._beside, self._at = job, shots, list(beside), rows
        self.stages = stages
        self._values: dict[Stage, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The value of a stage, computed where it isn't in the run folder; with it all sweeps of its kind."""
        stage = self.stages[name]
        if stage not in self._values:
            if isinstance(stage, Sweep):
                self._values.update(fetch(self._job, [stage, *self._alike(stage)], self._beside).items())
            else:
                self._values[stage] = stage.value(self._job)
        return self._values[stage]

    def learning_rate(self, name: str) -> float:
        """Mean learning rate of the warm-up's checkpoint that a stage looks at."""
        (checkpoint,) = (s for s in self.stages[name].needs(self._job) if isinstance(s, WarmupCheckpoint))
        return checkpoint.value(self._job).mean_lr

    def _alike(self, stage: Sweep) -> list[Sweep]:
        """The method's own other stages of that kind, so that a pass serves all of them."""
        return [s for s in self.stages.values() if isinstance(s, Sweep) and s != stage and type(s) is type(stage)]

    @property
    def ids(self) -> Ids:
        """(n,) content ids; an array of str to whoever reads it."""
        return self._job.ids if self._at is None else self._job.ids[self._at]

    @property
    def n_tokens(self) -> np.ndarray:
        """(n,) supervised tokens of each row, both sides of a pair; words where no tokenizer is loaded."""
        return self._job.n_tokens() if self._at is None else self._job.n_tokens()[self._at]

    def texts(self) -> Sequence[str]:
        """(n) the rows as plain text, read anew whenever they are gone through."""
        texts = self._job.texts()
        return texts if self._at is None else texts.take(self._at)

    @property
    def tasks(self) -> tuple[list[str], np.ndarray]:
        """The target's task names (j), sorted, and each of its rows' task as an index (m,)."""
        aim = self._job.aim(self._shots)
        return aim.names, aim.codes

    def column_names(self, per: str) -> list[str]:
        """What the columns of a target-aware method are called: the tasks, or `<task>.<k>` for each encoded row."""
        aim = self._job.aim(self._shots)
        return aim.names if per == "task" else [f"{aim.names[code]}.{k}" for k, code in enumerate(aim.pair_codes)]

    @property
    def encoded_tasks(self) -> np.ndarray:
        """(m',) the tasks of the target's rows that the template takes."""
        return self._job.aim(self._shots).pair_codes

    def target_texts(self, *, with_chosen: bool) -> list[str]:
        """(m) the target's prompts as plain text, with or without the chosen answer."""
        return self._job.aim(self._shots).texts(with_chosen=with_chosen)

    def say(self, text: str) -> None:
        """Print a line for the person at the terminal."""
        self._job.say(text)


@dataclass(frozen=True)
class Method(ABC):
    """A method with its options, which are its fields; a subclass is one row of the table of methods."""

    name: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Of: text, target, pairs; or the words of its stages. A test holds the two together."""
    cost: ClassVar[Cost]
    when: ClassVar[str]
    """When to take it, in words that a figure of ours backs (experiments/, docs/measured.md); the README's column."""

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        """What it needs computed, by the names that `score` asks for.

        Raises:
            RecipeError: the recipe or its data can't give that.
        """
        return {}

    @abstractmethod
    def score(self, features: Features) -> Scores:
        """Score every row; NaN or infinite: the row is quarantined.

        Raises:
            RecipeError: the data can't be scored in this way.
        """

    @abstractmethod
    def noise(self, columns: Columns, relative: float) -> np.ndarray | None:
        """Absolute noise (n,) of the scores; None where numerical noise changes nothing, or where it isn't known.

        Losses carry `relative`. A cosine carries it absolutely, whatever it is: its terms cancel, their rounding
        doesn't.

        Args:
            columns: `score`, the method's parts, and `n_tokens`: the tokens its losses are summed over; (n,) each.
            relative: noise of one loss.
        """

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield options that would do nothing with the others as they are, and why."""
        yield from ()

    @property
    def summed_over(self) -> Literal["chosen", "content"]:
        """Which tokens of a row its losses are summed over (see `Job.rows_of`)."""
        return "chosen"

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Any]]:
        """Its options: name -> (type, default)."""
        types = get_type_hints(cls)
        return {f.name: (types[f.name], f.default) for f in fields(cls)}


# -- noise ----------------------------------------------------------------------------------------------------------


def difference_noise(loss_ini: Any, loss_ref: Any, *, relative: float = NOISE) -> np.ndarray:
    """Absolute noise (n,) of DavIR, (L_ini − L_ref) / L_ini = 1 − r with r = L_ref / L_ini: ε = 2 · relative · |r|.

    Both losses carry `relative`; where the reference learnt little the score is near 0 and ε may be larger than 1e-6 of
    it by far. For RHO, L_ini − L_ref, the noise is `relative` · (|L_ini| + |L_ref|).
    """
    return 2 * relative * np.abs(np.asarray(loss_ref, float) / np.asarray(loss_ini, float))


def score_noise(columns: Columns, relative: float) -> np.ndarray:
    """Noise (n,) of a score that is one loss, or one norm."""
    return relative * np.abs(columns["score"])


def cosine_noise(columns: Columns, relative: float) -> np.ndarray:
    """Noise (n,) of a cosine of states: both sides come from a model."""
    return np.full(len(columns["score"]), 2 * relative)
