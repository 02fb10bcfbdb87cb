"""Ranking several answers to a prompt by a judge, so that the best and the worst become a preference pair.

A reward model gives each answer a number. A pairwise judge (`HttpJudge`) sees every two answers of a prompt in both
orders; an answer's score is its mean preference over the others, 0 to 1 (Borda count). Both feed
`keepset.judging.pairs.best_against_worst`: rewards have no ratio, so take a `min_gap` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from keepset.evaluate.reward import reward_scores
from keepset.judging.judge import Comparison, Judgements
from keepset.judging.pairs import ScoredAnswers


def rank_by_reward(
    model: Any, encoder: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]], *, batch_size: int = 8
) -> list[ScoredAnswers]:
    """Score every answer by a reward model.

    Args:
        model: see `reward_scores`.
        encoder: of its tokenizer.
        prompts: n prompts.
        answers: n lists of answers.
        batch_size: answers scored together.

    Raises:
        keepset.model.encode.RowRefused: the template refuses an answer, or it is too long.
    """
    rows = [
        encoder.encode_pair([{"role": "user", "content": p}], [{"role": "assistant", "content": a}]).input_ids
        for p, some in zip(prompts, answers, strict=True)
        for a in some
    ]
    scores = iter(reward_scores(model, rows, batch_size=batch_size).tolist())
    return [
        ScoredAnswers(p, list(some), [next(scores) for _ in some]) for p, some in zip(prompts, answers, strict=True)
    ]


def rank_by_comparison(
    judge: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[list[ScoredAnswers], Judgements]:
    """Score every answer by its mean preference over the prompt's other answers.

    Comparisons without a readable verdict don't count; an answer without any has the score NaN, and its prompt is left
    out later as `not-finite`. k answers take k·(k − 1) requests.

    Args:
        judge: has `compare(items) -> Judgements`, as `keepset.judging.judge.HttpJudge`.
        prompts: n prompts.
        answers: n lists of answers.

    Returns:
        The scored answers, and what the judge said.
    """
    places = [(i, a, b) for i, some in enumerate(answers) for a, b in combinations(range(len(some)), 2)]
    found = judge.compare([Comparison(prompts[i], answers[i][a], answers[i][b]) for i, a, b in places])
    won = [np.zeros(len(some)) for some in answers]
    met = [np.zeros(len(some)) for some in answers]
    for (i, a, b), preference in zip(places, found.preference, strict=True):
        if np.isfinite(preference):
            won[i][[a, b]] += preference, 1 - preference
            met[i][[a, b]] += 1
    with np.errstate(invalid="ignore"):
        scores = [(w / m).tolist() for w, m in zip(won, met, strict=True)]
    return [ScoredAnswers(p, list(s), v) for p, s, v in zip(prompts, answers, scores, strict=True)], found
