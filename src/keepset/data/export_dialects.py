"""Rows out as JSON texts: each as it came, or its messages in another dialect."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from keepset.data.pool import Message, Pool
from keepset.errors import DataError

log = logging.getLogger(__name__)


def _chat(messages: list[Message]) -> list[Message]:
    if messages[0]["role"] == "text":
        raise ValueError("the row is plain text, not a chat")
    return messages


def _as_messages(messages: list[Message]) -> dict[str, Any]:
    return {"messages": _chat(messages)}


_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _as_sharegpt(messages: list[Message]) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": _SHAREGPT[m["role"]], "value": m["content"]} | ({"train": False} if "train" in m else {})
            for m in _chat(messages)
        ]
    }


def _as_prompt_completion(messages: list[Message]) -> dict[str, Any]:
    if "train" in _chat(messages)[-1]:
        raise ValueError("its last answer is marked as not trained on")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _as_alpaca(messages: list[Message]) -> dict[str, Any]:
    system = ""
    if _chat(messages)[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    roles = [m["role"] for m in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2) or not roles:
        raise ValueError("Alpaca rows are user and assistant in turn")
    if any("train" in m for m in messages):
        raise ValueError("Alpaca rows can't mark an answer as not trained on")
    texts = [m["content"] for m in messages]
    row: dict[str, Any] = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system
    if len(texts) > 2:
        row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row


DIALECTS: dict[str, Callable[[list[Message]], dict[str, Any]]] = {
    "messages": _as_messages,
    "alpaca": _as_alpaca,
    "sharegpt": _as_sharegpt,
    "prompt-completion": _as_prompt_completion,
}


def row_texts(pool: Pool, to: str | None = None) -> list[str]:
    """Return each row as JSON text: its own, or rewritten in another dialect (a mixed pool: as `messages`).

    Raises:
        DataError: a row can't be said in that dialect; the message names it.
    """
    return texts_in(pool, to or common_dialect(pool))


def texts_in(pool: Pool, to: str | None) -> list[str]:
    """`row_texts` where None stands for each row as it came."""
    if to is None:
        raw: list[str] = pool.table["raw"].to_pylist()
        return raw
    write = DIALECTS[to]
    texts = []
    for k, messages in enumerate(pool.all_messages()):
        try:
            texts.append(json.dumps(write(messages), ensure_ascii=False))
        except ValueError as error:
            place = f"{pool.table['file'][k].as_py()}:{pool.table['line'][k].as_py()}"
            raise DataError(f"{place}: can't be written as {to}: {error}") from None
    return texts


def common_dialect(pool: Pool) -> str | None:
    """Return `messages` for rows that mix dialects; None where each row is written as it came."""
    used = set(pool.table["file"].unique().to_pylist())
    dialects = {info.dialect for info in pool.files if info.file in used}
    if len(dialects) > 1 and "text" in dialects:
        log.warning("the subset mixes plain text with chats (%s): each row is written as it came", sorted(dialects))
    elif len(dialects) > 1:
        log.info("the subset mixes dialects (%s): it is written as messages", ", ".join(sorted(dialects)))
        return "messages"
    return None
