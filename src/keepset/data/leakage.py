"""Leaks: pool rows that hold a target's prompt or answer. Exact matches; near ones are the near-duplicate search's."""

from __future__ import annotations

import hashlib

import numpy as np

from keepset.data.pool import Message, Pool
from keepset.data.target import Target


def _key(text: str) -> bytes:
    """Hash a text with case and white space evened out."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:16]


MIN_CHARS = 20


def _join(messages: list[Message]) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def find_leaks(pool: Pool, target: Target) -> np.ndarray:
    """Find the pool rows that a target (few shots or held-out pairs) already holds; case and white space don't count.

    A row's last message is its answer, what stands before it (less a system turn) the prompt. Answers shorter than
    `MIN_CHARS` ("Yes.") are no evidence on their own.

    Returns:
        (n,) object array of str: "row" (prompt and answer), "prompt", "answer", or "" for none.
    """
    prompts: set[bytes] = set()
    answers: set[bytes] = set()
    for row in target.table.select(["prompt", "chosen", "rejected"]).to_pylist():
        if row["prompt"]:
            prompts.add(_key(_join(row["prompt"])))
        for side in (row["chosen"], row["rejected"]):
            if side is not None and len(_join(side)) >= MIN_CHARS:
                answers.add(_key(_join(side)))
    kinds = np.full(len(pool), "", dtype=object)
    for i, messages in enumerate(pool.all_messages()):
        in_prompt = len(messages) > 1 and _key(_join(messages[:-1])) in prompts
        in_answer = _key(messages[-1]["content"]) in answers
        kinds[i] = "row" if in_prompt and in_answer else "prompt" if in_prompt else "answer" if in_answer else ""
    return kinds
