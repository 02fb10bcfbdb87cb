"""Shares of a budget over groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.errors import RecipeError
from keepset.recipe import SelectSpec
from keepset.selection.budget import shares
from keepset.selection.select import select


def spec(**options) -> SelectSpec:
    return SelectSpec.model_validate(options)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(0, 200),
    st.sampled_from(["proportional", "equal"]),
)
def test_shares_sum_to_the_budget_and_fit_their_groups(sizes, budget, quota):
    out = shares(np.array(sizes), budget, quota)
    assert out.sum() == min(budget, sum(sizes)) and (out >= 0).all() and (out <= sizes).all()
    if quota == "proportional":
        assert (np.abs(out - min(budget, sum(sizes)) * np.array(sizes) / max(1, sum(sizes))) < 1).all()
    else:
        unfilled = out[out < sizes]
        assert len(unfilled) == 0 or np.ptp(unfilled) <= 1 and unfilled.min() >= out.max() - 1


def test_quotas_by_hand():
    scores, ids = np.arange(10.0), [str(i) for i in range(10)]
    groups = np.array(["small"] * 2 + ["large"] * 8)  # the large group has the best scores

    def numbers(quota, **more):
        chosen = select(scores, ids, ("rows", 5), spec=spec(quota=quota, **more), groups=groups)
        return chosen.tolist()

    assert numbers("none") == [9, 8, 7, 6, 5]
    assert numbers("proportional") == [9, 8, 7, 6, 1]
    assert numbers("equal") == [9, 8, 7, 1, 0]
    assert numbers("floor", quota_floor=0.4) == [9, 8, 7, 1, 0]
    assert numbers("floor", quota_floor=0.2) == [9, 8, 7, 6, 1]
    assert numbers("floor", quota_floor=0.3) == [9, 8, 7, 1, 0]  # 1.5 rows: at least that, so two
    assert numbers("floor", quota_floor=0.5) == [9, 8, 7, 1, 0]  # 2.5 and 2.5 would be six of five: two each are kept
    with pytest.raises(RecipeError, match="quota_floor 0.6 for 2 groups"):
        numbers("floor", quota_floor=0.6)


def test_a_floor_no_row_can_fill_is_given_to_the_others():
    chosen = select(
        np.array([3.0, 2.0, 1.0]),
        ["a", "b", "c"],
        ("tokens", 20),
        spec=spec(quota="floor", quota_floor=0.5),
        groups=["x", "x", "y"],
        n_tokens=np.array([8, 9, 15]),
    )
    assert chosen.tolist() == [0, 1]  # y is owed 10 tokens, but its only row costs 15 and no longer fits
