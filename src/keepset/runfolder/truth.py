"""`validation.json` as values: how well every score says what training does; see `keepset.pipeline.validate`."""

from __future__ import annotations

from dataclasses import dataclass

from keepset.runfolder.records import Mean, Number, Record


@dataclass(frozen=True)
class OutcomeFacts(Record):
    """What was measured on every model of a design.

    Attributes:
        name: the measure.
        queries: items, or groups of items, that a correlation is taken for before they are averaged.
        spread: standard deviation over models of the mean over items, in `unit`.
        unit: of the measure.
        between_seeds: LDS of a second training of the same rows; None where none was trained.
        ceiling: √ of it: what a score that knew each expected outcome would reach.
        between_seeds_of_mean: the first figure for the mean over all items.
        ceiling_of_mean: √ of that.
    """

    name: str
    queries: int
    spread: Number
    unit: str
    between_seeds: Mean | None = None
    ceiling: float | None = None
    between_seeds_of_mean: Mean | None = None
    ceiling_of_mean: float | None = None


@dataclass(frozen=True)
class ScoreFacts(Record):
    """One score on one outcome, larger is better: LDS averaged over queries, and that of the mean over all items."""

    label: str
    outcome: str
    lds: Mean
    of_mean: Mean


@dataclass(frozen=True)
class Design(Record):
    """Models that differ in their rows alone: `halves`, or `leave-out`."""

    name: str
    models: int
    again: int
    kept: int
    outcomes: tuple[OutcomeFacts, ...]
    scores: tuple[ScoreFacts, ...]


@dataclass(frozen=True)
class Deciles(Record):
    """Trainings on each tenth of a score, best first, on one outcome.

    Attributes:
        label: the score.
        outcome: the measure.
        values: (10,) its mean over items and seeds.
        spearman: of place and outcome, positive where better-scored tenths train better models.
        p: two-sided, by permutation.
        seeds: trainings of each tenth.
    """

    label: str
    outcome: str
    values: tuple[Number, ...]
    spearman: Number
    p: Number
    seeds: int


@dataclass(frozen=True)
class LeftOut(Record):
    """Rows that one training did without, and what that changed: the model on all rows is better by so much."""

    ids: tuple[str, ...]
    worth: dict[str, Number]


@dataclass(frozen=True)
class Validation(Record):
    """`validation.json`.

    Attributes:
        rows: of the pool, that all trainings chose from.
        tokens: run in training, over all models and epochs.
        seconds: of training and measuring, as logged.
        designs: what was trained.
        deciles: one a score and outcome.
        left_out: one a training of `leave-out`.
        unscored: label -> rows without a score, which count as its mean.
    """

    rows: int
    tokens: int
    seconds: Number
    designs: tuple[Design, ...]
    deciles: tuple[Deciles, ...]
    left_out: tuple[LeftOut, ...]
    unscored: dict[str, int]
