"""The recipe's section `executor`: who computes, and where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ExecutorSpec(BaseModel):
    """Who computes shards and independent trainings; no number depends on it. `executor: ray` is short for its name."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    name: Literal["forks", "ray"] = Field(
        "forks", description="this machine (see batching.workers), or Ray's (`pip install 'keepset[ray]'`)"
    )
    address: str | None = Field(None, description="ray: of a running cluster, or `auto`; default: Ray on this machine")
    workers: int | None = Field(None, ge=1, description="ray: processes; default: one a GPU, without GPUs one a core")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
