"""Shards hold every row once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.runfolder.shards import plan_shards


@given(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=60), st.integers(1, 20), st.randoms())
@settings(max_examples=100, deadline=None)
def test_shards_hold_every_row_once_and_do_not_depend_on_order(ids, rows, random):
    shuffled = list(ids)
    random.shuffle(shuffled)
    plans = [
        [list(np.array(order, dtype=object)[shard]) for shard in plan_shards(np.array(order, dtype=object), rows)]
        for order in (ids, shuffled)
    ]
    assert plans[0] == plans[1]
    assert sorted(i for shard in plans[0] for i in shard) == sorted(ids)
    assert all(len(shard) <= rows for shard in plans[0])
