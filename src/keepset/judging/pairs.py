"""Turning scored answers into preference pairs: the best against the worst, if they lie far enough apart.

This is how ROSE's validation sets came from votes (arXiv 2412.00631): SHP keeps a question only if the best answer's
score is at least three times the worst's. One pair a question, since several pairs of one question are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


def best_against_worst(
    items: Iterable[ScoredAnswers],
    *,
    min_ratio: float = 1.0,
    min_gap: float = 0.0,
    min_best: float | None = None,
    length_share: float | None = None,
) -> tuple[list[dict[str, str | float]], list[Skipped]]:
    """Make one `prompt`/`chosen`/`rejected` row a prompt; prompts in = rows + skipped.

    The ratio is taken of positive scores: a worst score of 0 or less passes any ratio as long as the best is positive.
    Ties of score are broken by the text itself, so the order of the answers does not matter.

    Args:
        items: prompts with scored answers.
        min_ratio: the best score is at least this many times the worst; SHP's own rule is 2, ROSE's 3.
        min_gap: and at least this much larger.
        min_best: the chosen answer's score is at least this.
        length_share: of the pairs that qualify, take the one with the largest score gap among those whose lengths in
            characters differ by at most this share of the longer one; None takes best against worst.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score`, `task`; and the skipped prompts.
    """
    rows: list[dict[str, str | float]] = []
    skipped: list[Skipped] = []
    for item in items:
        found = _pair(item, min_ratio, min_gap, min_best, length_share)
        if isinstance(found, str):
            skipped.append(Skipped(item.prompt, found))
            continue
        best, worst = found
        rows.append(
            {
                "prompt": item.prompt,
                "chosen": item.answers[best],
                "rejected": item.answers[worst],
                "chosen_score": float(item.scores[best]),
                "rejected_score": float(item.scores[worst]),
                "task": item.task,
            }
        )
    return rows, skipped


def _pair(
    item: ScoredAnswers, min_ratio: float, min_gap: float, min_best: float | None, length_share: float | None
) -> tuple[int, int] | str:
    if len(item.answers) != len(item.scores):
        raise ValueError(f"{len(item.answers)} answers with {len(item.scores)} scores")
    if len(item.answers) < 2:
        return "one-answer"
    scores = np.asarray(item.scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        return "not-finite"
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], item.answers[i]))
    if length_share is None:
        candidates = [(order[0], order[-1])]
    else:
        # Largest gap first; equal gaps in the order of the ranking.
        candidates = sorted(
            ((a, b) for k, a in enumerate(order) for b in order[k + 1 :]), key=lambda p: scores[p[1]] - scores[p[0]]
        )
    reason = "no-length-match"
    for best, worst in candidates:
        high, low = scores[best], scores[worst]
        if high == low:
            reason = "tie" if length_share is None else reason
        elif (low > 0 and high < min_ratio * low) or high - low < min_gap or (high <= 0 and min_ratio > 1):
            reason = "ratio" if length_share is None else reason
        elif min_best is not None and high < min_best:
            reason = "ratio" if length_share is None else reason
        elif item.answers[best].strip() == item.answers[worst].strip():
            reason = "same-text" if length_share is None else reason
        elif length_share is not None and not _alike(item.answers[best], item.answers[worst], length_share):
            continue
        else:
            return best, worst
    return reason


def _alike(a: str, b: str, share: float) -> bool:
    return abs(len(a) - len(b)) <= share * max(len(a), len(b))


def group_answers(
    rows: Iterable[Mapping[str, Any]], *, prompt: str = "prompt", answer: str = "answer", score: str = "score",
    task: str | None = None,
) -> list[ScoredAnswers]:  # fmt: skip
    """Collect rows of one answer each (Stack Exchange posts, generated answers) by prompt, in order of appearance.

    Args:
        rows: mappings.
        prompt: column of the prompt.
        answer: column of the answer.
        score: column of the score.
        task: column of the task; None names all `all`.

    Raises:
        KeyError: a row without one of the columns.
    """
    found: dict[tuple[str, str], tuple[list[str], list[float]]] = {}
    for row in rows:
        answers, scores = found.setdefault((row[prompt], str(row[task]) if task else "all"), ([], []))
        answers.append(row[answer])
        scores.append(float(row[score]))
    return [ScoredAnswers(p, answers, scores, t) for (p, t), (answers, scores) in found.items()]


def shp_answers(rows: Iterable[Mapping[str, Any]]) -> list[ScoredAnswers]:
    """Collect SHP's rows (`history`, two answers with scores) into questions with all their answers.

    SHP holds many pairs of one post; an answer that stands in several counts once, with its best score.

    Args:
        rows: SHP's own columns: history, human_ref_A, human_ref_B, score_A, score_B, domain.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        answers = found.setdefault((row["history"], str(row.get("domain", "all"))), {})
        for side in ("A", "B"):
            text, value = row[f"human_ref_{side}"], float(row[f"score_{side}"])
            answers[text] = max(value, answers.get(text, value))
    return [ScoredAnswers(p, list(a), list(a.values()), t) for (p, t), a in found.items()]
