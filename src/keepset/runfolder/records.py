"""What a run folder's own files say, as values: findings, chosen subsets, evaluated items, the comparison.

`to_json` gives what the file holds and `from_json` reads it; a file that was written by this keepset comes back as the
same bytes. A number that is not finite stands as null in a file and is NaN here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from keepset.errors import KeepsetError

Kind = Literal["method", "random", "longest", "shortest", "full", "mix", "base", "dpo-direct"]
"""What a training set is in a comparison; `base` is the untrained model."""


Level = Literal["info", "warning"]


Number = Annotated[int | float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number as it stands, whole or not; null is NaN."""
adapter_of: Any = cache(TypeAdapter)


def read_json(kind: Any, value: Any, file: str) -> Any:
    """The content of a JSON file as `kind`, for example `tuple[Finding, ...]`.

    Raises:
        KeepsetError: it is of another form; the message names the file and the place in it.
    """
    try:
        return adapter_of(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise KeepsetError(
            f"{file}: not as this keepset writes it ({place}: {first['msg']}); delete it and run the same command again"
        ) from None


class Record:
    """A frozen dataclass that stands in a JSON file."""

    def to_json(self) -> dict[str, Any]:
        """Its fields in their order, records in it as mappings too."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, value: Any, file: str) -> Self:
        """Read it; see `read_json`."""
        record: Self = read_json(cls, value, file)
        return record


@dataclass(frozen=True)
class Finding(Record):
    """One thing worth knowing (`findings.json` is a list of them); `method` is "" where it is about the whole run."""

    name: str
    level: Level
    method: str
    figure: float | None
    text: str
    advice: str


# -- subsets.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredEdge(Record):
    """`keepset.selection.edge.Stability` of a subset; of the rows left out in doubt the first ones only."""

    chosen: tuple[str, ...]
    left_out: tuple[str, ...]
    gap: float | None
    share: Number


@dataclass(frozen=True)
class StoredSubset(Record):
    """A chosen training set as `subsets.json` has it under its name.

    `ids` are the rows' ids, best first; `file` has the checksum `sha256`; `pairs` is 0, as only `dpo-direct` has pairs,
    which isn't stored.
    """

    name: str
    label: str
    kind: Kind
    budget: str
    n_tokens: int
    pairs: int
    n_rows: int
    file: str
    sha256: str
    ids: tuple[str, ...]
    edge: StoredEdge | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields; `edge` stands after `pairs`, and only where it is known."""
        whole = asdict(self)
        edge = whole.pop("edge")
        first = {name: whole.pop(name) for name in ("name", "label", "kind", "budget", "n_tokens", "pairs")}
        return {**first, **({"edge": edge} if edge is not None else {}), **whole}


# -- evaluation/*/items.safetensors, epochs/*/points.json -------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """What one model gave for each held-out item.

    Attributes:
        pairs: of m pairs the columns (m,) of `keepset.evaluate.preference.PairLogps`; empty without pairs.
        tasks: task -> (m,) 1 for its pairs, else 0; empty where all are of one task.
        rows: of n rows the columns (n,) of `keepset.evaluate.heldout.Heldout`; empty without rows.
        sources: source -> (n,) 1 for its rows, else 0; empty where all are of one source.
        gsm8k: (g,) 1 where the answer is right, else 0; None if it wasn't asked.
    """

    pairs: Mapping[str, np.ndarray] = field(default_factory=dict)
    tasks: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    sources: Mapping[str, np.ndarray] = field(default_factory=dict)
    gsm8k: np.ndarray | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The file's arrays: `pair.<column>`, `pair.of.<task>`, `row.<column>`, `row.of.<source>`, `gsm8k.correct`."""
        parts = {"pair.": self.pairs, "pair.of.": self.tasks, "row.": self.rows, "row.of.": self.sources}
        arrays = {prefix + name: array for prefix, columns in parts.items() for name, array in columns.items()}
        return arrays if self.gsm8k is None else {**arrays, "gsm8k.correct": self.gsm8k}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Items:
        """Items from the file's arrays."""

        def under(prefix: str) -> dict[str, np.ndarray]:
            named = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
            return named if prefix.endswith(".of.") else {n: a for n, a in named.items() if not n.startswith("of.")}

        return Items(under("pair."), under("pair.of."), under("row."), under("row.of."), arrays.get("gsm8k.correct"))


@dataclass(frozen=True)
class Point(Record):
    """The means of one model, the final one (epoch None) or that after an epoch, from 1 on."""

    model: str
    epoch: int | None
    metrics: dict[str, Number]


# -- overlap.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoringFacts(Record):
    """One scoring over the rows that all have scored.

    Attributes:
        mean: of its scores.
        length_spearman: with the answer's tokens.
        mean_tokens: of an answer.
        mean_tokens_kept: of the best rows' answers, by budget.
    """

    mean: Number
    length_spearman: Number
    mean_tokens: Number
    mean_tokens_kept: dict[str, Number]


@dataclass(frozen=True)
class PairAgreement(Record):
    """Two scorings: Spearman of their scores, and the share of the top rows that both have, by budget."""

    a: str
    b: str
    spearman: Number
    overlap: dict[str, Number]


@dataclass(frozen=True)
class Agreement(Record):
    """How far several scorings agree over their n common rows; see `keepset.selection.agreement`.

    `sizes`: rows kept at each budget; `chance`: the overlap of two random rankings there.
    """

    n: int
    sizes: dict[str, int]
    chance: dict[str, Number]
    scorings: dict[str, ScoringFacts]
    pairs: tuple[PairAgreement, ...]


# -- comparison.json --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean(Record):
    """A mean over n items with its interval of nominal coverage `level`."""

    value: Number
    low: Number
    high: Number
    n: int
    level: Number


@dataclass(frozen=True)
class MeanOverSeeds(Mean):
    """The same over items that are averaged over seeds; `spread`: standard deviation over seeds, None with one."""

    spread: float | None


@dataclass(frozen=True)
class Versus(Record):
    """The paired difference to Random with its interval, p-values, and wins, ties and losses by item."""

    difference: Number
    low: Number
    high: Number
    p: Number
    n: int
    win_tie_loss: tuple[int, ...]
    p_holm: float | None = None


@dataclass(frozen=True)
class Cost(Record):
    """What choosing and one training took: seconds as logged, floating-point operations by count."""

    select_seconds: Number
    select_flops: Number
    train_seconds: Number
    train_flops: Number

    @property
    def flops(self) -> float:
        """Both together."""
        return self.select_flops + self.train_flops

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.select_seconds + self.train_seconds


@dataclass(frozen=True)
class TrainingSet(Record):
    """What a model was trained on; of the base, nothing. `budget` is as the recipe writes it."""

    label: str
    kind: Kind
    budget: str | None
    n_rows: int
    n_tokens: int


@dataclass(frozen=True)
class ModelRow(TrainingSet):
    """One trained model (or the base: seed None) with its means."""

    seed: int | None
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class Entry(TrainingSet):
    """One subset, all its seeds together; Random's subsets of one budget are one entry."""

    seeds: int
    metrics: dict[str, MeanOverSeeds]
    vs_random: dict[str, Versus]
    cost: Cost


@dataclass(frozen=True)
class StageCost(Record):
    """What a stage of the selection took, and the methods that need it."""

    stage: str
    methods: str
    rows: int
    tokens: int
    flops: Number
    seconds: Number


@dataclass(frozen=True)
class SelectionCost(Record):
    """What choosing by all methods took; `share`: of the operations of one training on the full pool."""

    flops: Number
    tokens: int
    seconds: Number
    share: float | None
    stages: tuple[StageCost, ...]


@dataclass(frozen=True)
class ParetoPoint(Record):
    """An entry by quality and cost; `front`: nothing at that cost or less is better."""

    label: str
    value: Number
    flops: Number
    seconds: Number
    front: bool


@dataclass(frozen=True)
class Link(Record):
    """Correlations of a validation loss with a performance metric over n points.

    `within`: the mean Spearman correlation inside a model, over its epochs; None with fewer than three each.
    """

    loss: str
    metric: str
    n: int
    spearman: Number
    pearson: Number
    within: float | None


@dataclass(frozen=True)
class Links(Record):
    """The links over the final models and the base, and over models and their epochs."""

    models: tuple[Link, ...]
    epochs: tuple[Link, ...]


@dataclass(frozen=True)
class Power(Record):
    """Four of five comparisons with Random on n items, whose differences have this `sd`, see one of `smallest`."""

    n: int
    sd: Number
    smallest: Number


@dataclass(frozen=True)
class Comparison(Record):
    """`comparison.json`; see `keepset.pipeline.compare.compare`."""

    rows: tuple[ModelRow, ...]
    summary: tuple[Entry, ...]
    full_training_flops: Number
    selection: SelectionCost
    pareto: dict[str, tuple[ParetoPoint, ...]]
    loss_vs_performance: Links
    headline: str = ""
    power: dict[str, Power] | None = None

    def to_json(self) -> dict[str, Any]:
        """Its fields; the last two only where they are known: files of before lack them."""
        whole = asdict(self)
        return whole if self.power is not None else {k: v for k, v in whole.items() if k not in ("headline", "power")}
