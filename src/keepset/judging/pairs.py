"""Turning scored answers into preference pairs: the best against the worst, if they lie far enough apart.

This is how ROSE's validation sets came from votes (arXiv 2412.00631): SHP keeps a question only if the best answer's
score is at least three times the worst's. One pair a question, since several pairs of one question are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ScoredAnswers:
    """One prompt with n answers and their scores (votes, or a judge's)."""

    prompt: str
    answers: Sequence[str]
    scores: Sequence[float]
    task: str = "all"


@dataclass(frozen=True)
class Skipped:
    """A prompt that gave no pair, and why: one-answer, not-finite, tie, ratio, same-text or no-length-match."""

    prompt: str
    reason: str


@dataclass(frozen=True)
class PairRule:
    """Which two answers of a prompt become a pair.

    The ratio is taken of positive scores: a worst score of 0 or less passes any ratio as long as the best is positive.

    Attributes:
        min_ratio: the best score is at least this many times the worst; SHP's own rule is 2, ROSE's 3.
        min_gap: and at least this much larger.
        min_best: the chosen answer's score is at least this.
        length_share: of the pairs that qualify, take the one with the largest score gap among those whose lengths in
            characters differ by at most this share of the longer one; None takes best against worst.
    """

    min_ratio: float = 1.0
    min_gap: float = 0.0
    min_best: float | None = None
    length_share: float | None = None


@dataclass(frozen=True)
class PreferencePair:
    """A row for preference training."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    task: str


def best_against_worst(
    items: Iterable[ScoredAnswers], rule: PairRule = PairRule()
) -> tuple[list[PreferencePair], list[Skipped]]:
    """Make one pair a prompt; prompts in = pairs + skipped.

    Ties of score are broken by the text itself, so the order of the answers does not matter. Returns the pairs; and the
    skipped prompts.
    """
    pairs: list[PreferencePair] = []
    skipped: list[Skipped] = []
    for item in items:
        places = _best_and_worst(item, rule)
        if isinstance(places, str):
            skipped.append(Skipped(item.prompt, places))
            continue
        (best, worst), answers, scores = places, item.answers, item.scores
        pairs.append(
            PreferencePair(
                item.prompt, answers[best], answers[worst], float(scores[best]), float(scores[worst]), item.task
            )
        )
    return pairs, skipped


def _best_and_worst(item: ScoredAnswers, rule: PairRule) -> tuple[int, int] | str:
    """The places of the chosen and the rejected answer, or why there are none."""
    if len(item.answers) != len(item.scores):
        raise ValueError(f"{len(item.answers)} answers with {len(item.scores)} scores")
    if len(item.answers) < 2:
        return "one-answer"
    scores = np.asarray(item.scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        return "not-finite"
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], item.answers[i]))
    if rule.length_share is None:
        return _unfit(item, order[0], order[-1], rule) or (order[0], order[-1])
    # Largest gap first; equal gaps in the order of the ranking.
    for a, b in sorted(combinations(order, 2), key=lambda pair: scores[pair[1]] - scores[pair[0]]):
        if not _unfit(item, a, b, rule) and _alike(item.answers[a], item.answers[b], rule.length_share):
            return a, b
    return "no-length-match"


def _unfit(item: ScoredAnswers, best: int, worst: int, rule: PairRule) -> str | None:
    """Why two answers make no pair, lengths aside."""
    high, low = float(item.scores[best]), float(item.scores[worst])
    if high == low:
        return "tie"
    if (low > 0 and high < rule.min_ratio * low) or (high <= 0 and rule.min_ratio > 1):
        return "ratio"
    if high - low < rule.min_gap or (rule.min_best is not None and high < rule.min_best):
        return "ratio"
    return "same-text" if item.answers[best].strip() == item.answers[worst].strip() else None


def _alike(a: str, b: str, share: float) -> bool:
    return abs(len(a) - len(b)) <= share * max(len(a), len(b))


@dataclass(frozen=True)
class AnswerColumns:
    """The columns of rows that hold one answer each; without one of the task all are of the task `all`."""

    prompt: str = "prompt"
    answer: str = "answer"
    score: str = "score"
    task: str | None = None


def group_answers(
    rows: Iterable[Mapping[str, Any]], columns: AnswerColumns = AnswerColumns(), *, scored: bool = True
) -> list[ScoredAnswers]:
    """Collect rows of one answer each (Stack Exchange posts, generated answers) by prompt, in order of appearance.

    With `scored` False the scores are not looked at: all are 0, and a judge is to give them.

    Raises:
        KeyError: a row without one of the columns.
        TypeError, ValueError: a score that is no number.
    """
    grouped: dict[tuple[str, str], tuple[list[str], list[float]]] = {}
    for row in rows:
        key = row[columns.prompt], str(row[columns.task]) if columns.task else "all"
        answers, scores = grouped.setdefault(key, ([], []))
        answers.append(row[columns.answer])
        scores.append(float(row[columns.score]) if scored else 0.0)
    return [ScoredAnswers(p, answers, scores, t) for (p, t), (answers, scores) in grouped.items()]


def shp_answers(rows: Iterable[Mapping[str, Any]]) -> list[ScoredAnswers]:
    """Collect SHP's rows (`history`, two answers with scores) into questions with all their answers.

    SHP holds many pairs of one post; an answer that stands in several counts once, with its best score.
    """
    grouped: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        answers = grouped.setdefault((row["history"], str(row.get("domain", "all"))), {})
        for side in ("A", "B"):
            text, value = row[f"human_ref_{side}"], float(row[f"score_{side}"])
            answers[text] = max(value, answers.get(text, value))
    return [ScoredAnswers(p, list(a), list(a.values()), t) for (p, t), a in grouped.items()]
