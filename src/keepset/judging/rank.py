"""Ranking several answers to a prompt by a judge, so that the best and the worst become a preference pair.

A reward model gives each answer a number. A pairwise judge (`HttpJudge`) sees every two answers of a prompt in both
orders; an answer's score is its mean preference over the others, 0 to 1 (Borda count). Both feed
`keepset.judging.pairs.best_against_worst`: rewards have no ratio, so take a `min_gap` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Protocol

import numpy as np

from keepset.judging.judge import Comparison, Judgements, RewardJudge
from keepset.judging.pairs import ScoredAnswers


class Judge(Protocol):
    """Whatever compares answers: `keepset.judging.judge.HttpJudge`, for example."""

    def compare(self, items: Sequence[Comparison]) -> Judgements:
        """Judge n comparisons."""


def rank_by_reward(judge: RewardJudge, items: Sequence[ScoredAnswers]) -> list[ScoredAnswers]:
    """The same answers with a reward model's scores.

    Raises:
        keepset.model.encode.RowRefused: the template refuses an answer, or it is too long.
    """
    scores = iter(judge.scores([(item.prompt, answer) for item in items for answer in item.answers]).tolist())
    return [replace(item, scores=[next(scores) for _ in item.answers]) for item in items]


def rank_by_comparison(judge: Judge, items: Sequence[ScoredAnswers]) -> tuple[list[ScoredAnswers], Judgements]:
    """The same answers, each scored by its mean preference over the prompt's other answers.

    Comparisons without a readable verdict don't count; an answer without any has the score NaN, and its prompt is left
    out later as `not-finite`. k answers take k·(k − 1) requests. Returns the scored answers, and what the judge said.
    """
    places = [(i, a, b) for i, item in enumerate(items) for a, b in combinations(range(len(item.answers)), 2)]
    said = judge.compare([Comparison(items[i].prompt, items[i].answers[a], items[i].answers[b]) for i, a, b in places])
    won = [np.zeros(len(item.answers)) for item in items]
    met = [np.zeros(len(item.answers)) for item in items]
    for (i, a, b), preference in zip(places, said.preference, strict=True):
        if np.isfinite(preference):
            won[i][[a, b]] += preference, 1 - preference
            met[i][[a, b]] += 1
    with np.errstate(invalid="ignore"):
        scores = [(w / m).tolist() for w, m in zip(won, met, strict=True)]
    return [replace(item, scores=own) for item, own in zip(items, scores, strict=True)], said
