"""GSM8K: exact match of the final number by greedy generation, and the loss of the gold answers.

Official rule (openai/grade-school-math): the first `#### <number>` with commas removed must be the gold one, character
for character; an answer without the mark is wrong. A model that was never shown the mark gets 0 by that rule whatever
it can do, so the headline takes the last number of an answer without a mark, and compares numbers, not characters. Both
are given.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from keepset.data import load_pool
from keepset.errors import DataError
from keepset.evaluate.generate import generate
from keepset.evaluate.heldout import heldout_losses
from keepset.evaluate.statistics import bootstrap_ci
from keepset.model.encode import encode_all

OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
MARKED = re.compile(r"####[^0-9\n-]{0,20}(-?[^0-9\n]{0,3}?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?[$€£]?\s?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def official_answer(text: str) -> str | None:
    """Return the number as the official evaluation extracts it, or None."""
    match = OFFICIAL.search(text)
    return match[1].strip().replace(",", "") if match else None


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, else the last number in the text; None if there is none.

    Currency signs, thousands commas, a trailing full stop and zeros after the point make no difference.
    """
    marked = MARKED.findall(text)
    numbers = marked or NUMBER.findall(_plain(text))
    return _number(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    # A hyphen between two numbers ("16-3") or after a word is no sign.
    return re.sub(r"(?<=[0-9A-Za-z)])-(?=[0-9$.])", " ", text)


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[^0-9.\-]", "", text))
    except InvalidOperation:
        return None


def score(gold: str, answer: str) -> tuple[bool, bool]:
    """Return `(right by number, right by the official rule)`.

    Raises:
        DataError: the gold answer has no number.
    """
    want, want_official = final_number(gold), official_answer(gold)
    if want is None:
        raise DataError(f"gold answer without a number: {gold[-80:]!r}")
    got = final_number(answer)
    return got is not None and got == want, want_official is not None and official_answer(answer) == want_official


def evaluate_gsm8k(
    model: Any, encoder: Any, data: Any, *, limit: int = 50, max_new_tokens: int = 256
) -> dict[str, Any]:
    """Answer the first `limit` questions and score them.

    Returns:
        JSON-able: `accuracy` (interval, by number), `accuracy_official` (interval), `loss` (nats a token of the gold
        answers), `n`, `finished` (share that ended by itself), `marked` (share with `####`), `correct` (n of 0/1) and
        `answers` (n texts).

    Raises:
        DataError: no usable row, or a gold answer without a number.
    """
    pool = load_pool(data)
    rows = [pool.messages(i) for i in range(min(limit, len(pool)))]
    encoded, _ = encode_all(encoder, rows)
    usable = [i for i, row in enumerate(encoded) if row is not None]
    if not usable:
        raise DataError("gsm8k: no usable question/answer row")
    prompts, gold = [rows[i][:-1] for i in usable], [rows[i][-1]["content"] for i in usable]
    answers = generate(model, encoder, prompts, max_new_tokens=max_new_tokens)
    scored = np.array([score(g, a.text) for g, a in zip(gold, answers, strict=True)], dtype=np.float64)
    losses = heldout_losses(model, [encoded[i] for i in usable])  # type: ignore[misc]
    return {
        "n": len(usable),
        "accuracy": bootstrap_ci(scored[:, 0]).as_dict(),
        "accuracy_official": bootstrap_ci(scored[:, 1]).as_dict(),
        "loss": float(losses.nll.sum() / losses.n_tokens.sum()),
        "finished": float(np.mean([a.finished for a in answers])),
        "marked": float(np.mean(["####" in a.text for a in answers])),
        "correct": scored[:, 0].astype(int).tolist(),
        "answers": [a.text for a in answers],
    }
