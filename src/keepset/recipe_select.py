"""The recipe's section on selecting: how scores become a subset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keepset.recipe_truth import Strict


class SelectSpec(Strict):
    """How scores become a subset."""

    policy: Literal["top_k", "round_robin", "knn_kde", "transport", "mmr", "facility_location", "sample"] = "top_k"
    quota: Literal["none", "proportional", "equal", "floor"] = Field("none", description="share a source gets")
    quota_by: Literal["source", "category"] = Field("source", description="what a quota counts by")
    quota_floor: float = Field(0.05, ge=0, le=1, description="`floor`: least share of the budget a source gets")
    dedup: Literal["none", "exact", "near"] = Field("none", description="drop repeats, best score kept")
    near_threshold: float = Field(0.8, gt=0, le=1, description="`near`: MinHash Jaccard of word 5-grams")
    diversity: float = Field(0.3, ge=0, le=1, description="mmr: 0 = score only, 1 = diversity only")
    temperature: float = Field(1.0, gt=0, description="sample: softmax temperature over standardised scores")
    knn_alpha: float = Field(0.5, gt=0, lt=1, description="knn_kde: TSDS's α; near 1 = only each query's nearest rows")
    transport_reg: float = Field(
        0.01, ge=0.002, description="transport: entropy; larger spreads a query over more rows"
    )
