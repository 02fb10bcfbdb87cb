"""Weights of rows from their scores: by hand, mean 1, order and ties kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.selection.weights import row_weights


def test_by_hand():
    assert row_weights(np.array([5.0, 7.0]), "rank").tolist() == [0.5, 1.5]
    assert row_weights(np.array([1.0, 1.0, 9.0]), "rank").tolist() == pytest.approx([2 / 3, 2 / 3, 5 / 3])
    e = np.exp([-1, 1])  # z of two rows
    assert row_weights(np.array([5.0, 7.0]), "softmax").tolist() == pytest.approx((2 * e / e.sum()).tolist())
    assert row_weights(np.array([5.0, 7.0]), "softmax", temperature=2).tolist() == pytest.approx(
        (2 * np.exp([-0.5, 0.5]) / np.exp([-0.5, 0.5]).sum()).tolist()
    )


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30), st.sampled_from(["softmax", "rank"]))
def test_the_mean_is_one_and_larger_scores_weigh_more(scores, form):
    values = np.array(scores, dtype=float)
    weights = row_weights(values, form)
    assert weights.mean() == pytest.approx(1) and (weights > 0).all()
    for i in range(len(scores)):
        assert ((weights > weights[i]) == (values > values[i])).all()


def test_extremes_and_what_is_refused():
    assert row_weights(np.array([0.0, 1e9, 2e9]), "softmax", temperature=1e-6).tolist() == [0, 0, 3]
    assert row_weights(np.zeros(3), "softmax").tolist() == [1, 1, 1] and len(row_weights(np.zeros(0), "rank")) == 0
    for scores, form, temperature in (([np.nan], "rank", 1), ([1.0], "linear", 1), ([1.0], "softmax", 0)):
        with pytest.raises(ValueError, match="score|form"):
            row_weights(np.array(scores), form, temperature=temperature)
