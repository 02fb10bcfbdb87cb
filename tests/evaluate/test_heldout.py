"""Held-out losses by hand."""

import numpy as np
import pytest

from keepset.evaluate.heldout import Heldout, heldout_table


def test_heldout_token_mean_and_row_mean_differ():
    table = heldout_table(Heldout(np.array([2.0, 30.0]), np.array([1, 10])), ["x", "y"], resamples=100)
    assert table["token_mean"]["value"] == pytest.approx(32 / 11) and table["row_mean"]["value"] == 2.5
    assert table["sources"]["y"] == {
        "n": 1, "tokens": 10,
        "token_mean": {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1, "level": 0.95},
        "row_mean": {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1, "level": 0.95},
    }  # fmt: skip
