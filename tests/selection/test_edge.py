"""Rows in doubt at the cut of a selection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.selection.edge import stability

IDS = list("abcdef")


def test_rows_within_noise_of_the_other_side_are_named():
    scores = [5.0, 3.0 + 2e-6, 3.0 + 1e-6, 3.0, 3.0 - 1e-5, 1.0]
    found = stability(scores, IDS, [1, 1, 1, 0, 0, 0])
    assert found.chosen == ["c", "b"] and found.left_out == ["d"]
    assert found.gap == pytest.approx(1e-6) and found.share == pytest.approx(2 / 3)


def test_a_clear_cut_has_nobody_in_doubt():
    found = stability([5, 4, 3, 2, 1, 0], IDS, [1, 1, 1, 0, 0, 0])
    assert (found.chosen, found.left_out, found.gap, found.share) == ([], [], 1.0, 0.0)


def test_ties_are_in_doubt_even_without_noise():
    found = stability([1, 1, 1, 0], list("abcd"), [1, 1, 0, 0], noise=0)
    assert found.chosen == ["a", "b"] and found.left_out == ["c"] and found.gap == 0


@pytest.mark.parametrize("selected", [[1] * 4, [0] * 4])
def test_no_other_side_no_doubt(selected):
    assert stability([1, 1, 1, 1], list("abcd"), selected).gap is None


def test_rows_without_a_score_do_not_count():
    found = stability([2, 1, np.nan, np.inf], list("abcd"), [1, 0, 0, 1])
    assert found.gap == 1 and found.chosen == found.left_out == []


@pytest.mark.parametrize("noise", [-1.0, np.nan])
def test_mistakes(noise):
    with pytest.raises(ValueError, match="noise"):
        stability([1, 2], ["a", "b"], [1, 0], noise=noise)
    with pytest.raises(ValueError, match="lengths differ"):
        stability([1, 2], list("abc"), [1, 0])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 29), st.floats(0, 10), st.randoms())
def test_noise_of_that_size_moves_only_rows_that_were_named(scores, k, noise, random):
    """Whatever noise up to ε does to the scores, rows that were not named stay where they are."""
    values, ids = np.array(scores), np.array([f"{i:02d}" for i in range(len(scores))])
    k = min(k, len(values) - 1)
    top = np.zeros(len(values), bool)
    top[np.lexsort((ids, -values))[:k]] = True
    found = stability(values, ids, top, noise=noise)
    moved = values + np.array([random.uniform(-noise, noise) for _ in values])
    again = np.zeros(len(values), bool)
    again[np.lexsort((ids, -moved))[:k]] = True
    slack = 1e-9 * max(1.0, np.abs(values).max())  # the sums themselves round
    wide = stability(values, ids, top, noise=noise + slack)
    named = {*wide.chosen, *wide.left_out}
    assert {*found.chosen, *found.left_out} <= named
    assert set(ids[top != again]) <= named
