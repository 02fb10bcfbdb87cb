"""Good rows of every dialect, shared by the data tests: field values are marked so that damage can be aimed at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def good(dialect: str, k: int) -> dict[str, Any]:
    """A sound row number k; no two k give the same content."""
    q, a, b = f"Question {k}: what is {k} + {k}?", f"It is {2 * k}.", f"Perhaps {2 * k + 1}, I am unsure."
    user, answer = {"role": "user", "content": q}, {"role": "assistant", "content": a}
    other = {"role": "assistant", "content": b}
    return {
        "messages": {"messages": [{"role": "system", "content": "Be brief."}, user, answer], "tag": k},
        "sharegpt": {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "tag": k},
        "prompt-completion": {"prompt": q, "completion": a, "tag": k},
        "prompt-completion-chat": {"prompt": [user], "completion": [answer], "tag": k},
        "alpaca": {"instruction": q, "input": f"Case {k}", "output": a, "tag": k},
        "question-answer": {"question": q, "answer": a, "tag": k},
        "text": {"text": f"{q} {a}", "tag": k},
        "preference": {"prompt": q, "chosen": a, "rejected": b, "tag": k},
        "preference-chat": {"prompt": [user], "chosen": [answer], "rejected": [other], "tag": k},
        "preference-implicit": {"chosen": [user, answer], "rejected": [user, other], "tag": k},
        "hh-rlhf": {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}",
            "tag": k,
        },
        "shp": {"history": q, "human_ref_A": a, "human_ref_B": b, "labels": 1, "score_A": 9, "score_B": 3, "tag": k},
        "llamafactory-preference": {
            "conversations": [{"from": "human", "value": q}],
            "chosen": {"from": "gpt", "value": a},
            "rejected": {"from": "gpt", "value": b},
            "tag": k,
        },
        "stack-exchange": {"title": q, "body": f"More of {k}.", "chosen": a, "rejected": b, "tag": k},
    }[dialect]


SFT = ["messages", "sharegpt", "prompt-completion", "prompt-completion-chat", "alpaca", "question-answer", "text"]
PAIRS = [
    "preference",
    "preference-chat",
    "preference-implicit",
    "hh-rlhf",
    "shp",
    "llamafactory-preference",
    "stack-exchange",
]
ALL = SFT + PAIRS

#: The columns that hold the prompt and the answer.
PROMPT = {"alpaca": "instruction", "question-answer": "question", "shp": "history", "stack-exchange": "title"}
PROMPT |= dict.fromkeys(("prompt-completion", "prompt-completion-chat", "preference", "preference-chat"), "prompt")
PROMPT |= {"llamafactory-preference": "conversations"}
ANSWER = {"messages": "messages", "sharegpt": "conversations", "alpaca": "output", "question-answer": "answer"}
ANSWER |= dict.fromkeys(("prompt-completion", "prompt-completion-chat"), "completion") | {"text": "text"}
ANSWER |= dict.fromkeys(PAIRS, "chosen") | {"shp": "human_ref_A"}


def lines(dialect: str, n: int = 5) -> list[bytes]:
    return [json.dumps(good(dialect, k), ensure_ascii=False).encode() for k in range(n)]


def write_lines(path: Path, rows: list[bytes], *, end: bytes = b"\n") -> Path:
    path.write_bytes(b"\n".join(rows) + end)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(row, ensure_ascii=False).encode() for row in rows])


def jsonl(n: int = 5) -> bytes:
    return b"\n".join(lines("alpaca", n)) + b"\n"


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
