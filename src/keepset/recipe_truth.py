"""Sections of a recipe that say what a choice is held against: the controls, and trainings that judge the scores."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Base of every section: unknown keys are errors; what is written has the names that are read."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As pydantic's, `validate` under its name in recipes (a field can't be called that)."""
        return super().model_dump(**{"by_alias": True, **options})

    def model_dump_json(self, **options: Any) -> str:
        """The same as JSON."""
        return super().model_dump_json(**{"by_alias": True, **options})


class ControlSpec(Strict):
    """What every comparison is held against."""

    random_seeds: list[int] = Field([0, 1, 2], description="Random of the same size, once per seed")
    longest: bool = Field(True, description="the longest completions of the same size")
    shortest: bool = Field(False, description="the shortest completions of the same size")
    full: bool = Field(False, description="train on the whole pool")
    base: bool = Field(True, description="the untrained base")
    dpo_direct: bool = Field(False, description="no selection: DPO (beta 0.1) on the target's pairs, by `train`")


class ValidateSpec(Strict):
    """Trainings on chosen parts of the pool, against whose outcomes every score is held."""

    rows: int = Field(200, ge=4, description="rows of the pool (all, if it has fewer), drawn with the recipe's seed")
    models: int = Field(60, ge=0, description="trainings on random halves of these rows")
    again: int = Field(12, ge=0, description="of them trained with a second seed too: the noise ceiling")
    deciles: list[str] = Field(default_factory=list, description="labels: a training on each tenth of their scores")
    leave_out: int = Field(0, ge=0, description="trainings with one row (or block) left out")
    block: int = Field(1, ge=1, description="rows of a block that is left out")
    seeds: list[int] = Field(
        [0, 1], min_length=1, description="the first trains all, the second those trained again; deciles take every one"
    )
