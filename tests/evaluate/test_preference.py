"""Accuracy, margins and held-out losses by hand."""

import json

import numpy as np
import pytest

from keepset.evaluate.heldout import Heldout, heldout_table
from keepset.evaluate.preference import PairLogps, correct, length_matched, margins, preference_table


def logps(chosen, rejected, n_chosen, n_rejected):
    return PairLogps(*(np.asarray(c) for c in (chosen, rejected, n_chosen, n_rejected)))


POLICY = logps([-10.0, -30.0, -8.0], [-12.0, -20.0, -8.0], [5, 20, 4], [5, 10, 4])
BASE = logps([-20.0, -30.0, -9.0], [-10.0, -25.0, -9.0], [5, 20, 4], [5, 10, 4])


def test_margins_by_hand():
    got = margins(POLICY, BASE)
    assert got["policy_sum"].tolist() == [2, -10, 0]
    assert got["policy_mean"] == pytest.approx([-2 + 2.4, -1.5 + 2, 0])
    assert got["implicit_sum"].tolist() == [10 + 2, 0 - 5, 0]
    assert got["implicit_mean"] == pytest.approx([2 + 0.4, -0.5, 0])
    # DavIR's score of each side is 1 - L_policy / L_base: (1 - .5) - (1 - 1.2), (1 - 1) - (1 - .8), equal.
    assert got["implicit_relative"] == pytest.approx([0.5 + 0.2, 0 - 0.2, 0])
    assert set(margins(POLICY)) == {"policy_sum", "policy_mean"}


def test_a_tie_is_half():
    assert correct([1.0, -1.0, 0.0]).tolist() == [1, 0, 0.5]


def test_the_base_against_itself_is_at_chance():
    table = preference_table(BASE, BASE, resamples=100)
    for form in ("implicit_sum", "implicit_mean", "implicit_relative"):
        assert table["all"][form]["accuracy"]["value"] == 0.5
        assert table["all"][form]["margin"]["value"] == 0


def test_length_match_counts_the_longer_side():
    assert length_matched([10, 8, 7, 10], [8, 10, 10, 10], 0.2).tolist() == [True, True, False, True]


def test_table_groups_and_is_json():
    table = preference_table(POLICY, BASE, ["a", "b", "b"], length_match=0.2, resamples=200, seed=1)
    assert table["all"]["n"] == 3 and table["length_matched"]["n"] == 2
    assert table["all"]["policy_sum"]["accuracy"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert table["length_matched"]["policy_sum"]["accuracy"]["value"] == pytest.approx(0.75)
    assert table["tasks"]["b"]["all"]["n"] == 2 and table["tasks"]["b"]["length_matched"]["n"] == 1
    assert table["all"]["loss_chosen"]["value"] == pytest.approx(48 / 29)
    assert table["all"]["chosen_longer"] == pytest.approx(1 / 3)
    assert table["all"]["policy_sum"]["length_pearson"] == pytest.approx(np.corrcoef([2, -10, 0], [0, 10, 0])[0, 1])
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_a_group_without_matched_pairs_says_so():
    table = preference_table(logps([-1.0], [-2.0], [1], [9]), tasks=["only"], resamples=100)
    assert table["length_matched"] == {"n": 0} == table["tasks"]["only"]["length_matched"]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="different pairs"):
        margins(POLICY, logps([-1.0] * 3, [-1.0] * 3, [1, 1, 1], [1, 1, 1]))
    with pytest.raises(ValueError, match="no pairs"):
        preference_table(logps([], [], [], []))
    with pytest.raises(ValueError, match="no supervised token"):
        logps([-1.0], [-1.0], [0], [1])
    with pytest.raises(ValueError, match="NaN"):
        preference_table(logps([np.nan], [-1.0], [1], [1]))


def test_heldout_token_mean_and_row_mean_differ():
    table = heldout_table(Heldout(np.array([2.0, 30.0]), np.array([1, 10])), ["x", "y"], resamples=100)
    assert table["token_mean"]["value"] == pytest.approx(32 / 11) and table["row_mean"]["value"] == 2.5
    assert table["sources"]["y"] == {
        "n": 1, "tokens": 10,
        "token_mean": {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1, "level": 0.95},
        "row_mean": {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1, "level": 0.95},
    }  # fmt: skip
