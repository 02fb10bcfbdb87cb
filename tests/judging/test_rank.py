"""Answers ranked by comparing each with each."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from keepset.judging.judge import Judgements  # noqa: E402
from keepset.judging.pairs import ScoredAnswers  # noqa: E402
from keepset.judging.rank import rank_by_comparison  # noqa: E402


def test_ranking_by_comparisons_is_the_mean_preference():
    class Longest:
        def compare(self, items):
            values = [np.nan if "?" in i.answer + i.baseline else float(len(i.answer) > len(i.baseline)) for i in items]
            return Judgements(np.array(values), np.stack([values, values], axis=1))

    (ranked, odd), _ = rank_by_comparison(
        Longest(), [ScoredAnswers("p", ["a", "ccc", "bb"], [0] * 3, "t"), ScoredAnswers("q", ["?", "x"], [0] * 2)]
    )
    assert ranked.scores == [0, 1, 0.5] and ranked.task == "t" and np.isnan(odd.scores).all()
