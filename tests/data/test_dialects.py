"""What each dialect's columns become: messages, and (prompt, chosen, rejected)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_rows import ALL, PAIRS, SFT, good, write_rows
from keepset.data import load_pool, load_target
from keepset.data.dialects import detect


def U(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def A(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def S(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def T(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


SFT_CASES: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": [S("s"), U("q"), A("a"), U("r"), A("b")]}, [S("s"), U("q"), A("a"), U("r"), A("b")]),
    "messages with other columns": ({"id": 3, "messages": [U("q"), A("a")], "tools": None}, [U("q"), A("a")]),
    "messages, developer and capitals": (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "User", "content": "q"}, A("a")]},
        [S("s"), U("q"), A("a")],
    ),
    "messages with text parts": (
        {"messages": [U([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), A("c")]},  # type: ignore[arg-type]
        [U("ab"), A("c")],
    ),
    "messages with from and value": (
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [U("q"), A("a")],
    ),
    "messages with tools in use": (
        {"messages": [U("q"), A("call"), T("42"), A("a")]},
        [U("q"), A("call"), T("42"), A("a")],
    ),
    "messages that start with the assistant": (
        {"messages": [A("hello"), U("q"), A("a")]},
        [A("hello"), U("q"), A("a")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [U("q"), A("a")],
    ),
    "sharegpt with a system column": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]},
        [S("s"), U("q"), A("a")],
    ),
    "sharegpt with a function call": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [U("q"), A("{}"), T("42"), A("a")],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [U("q"), A("a")]),
    "prompt and response": ({"prompt": "q", "response": "a"}, [U("q"), A("a")]),
    "completion joined by a space": ({"prompt": "q", "completion": " a"}, [U("q"), A("a")]),
    "completion that is indented": ({"prompt": "q", "completion": "    return 1\n"}, [U("q"), A("    return 1\n")]),
    "prompt in messages": ({"prompt": [S("s"), U("q")], "completion": [A("a")]}, [S("s"), U("q"), A("a")]),
    "prompt in messages, completion text": ({"prompt": [U("q")], "completion": "a"}, [U("q"), A("a")]),
    "unpaired KTO": ({"prompt": "q", "completion": "a", "label": True}, [U("q"), A("a")]),
    "wrapped prompt": (
        {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "completion": " b\n"},
        [U("q"), A("a"), U("r"), A("b")],
    ),
    "prompt that only quotes a dialogue": (
        {"prompt": "Explain:\n\nHuman: q\n\nAssistant:", "completion": "a"},
        [U("Explain:\n\nHuman: q\n\nAssistant:"), A("a")],
    ),
    "alpaca": ({"instruction": "i", "input": "x", "output": "a"}, [U("i\nx"), A("a")]),
    "alpaca without input": ({"instruction": "i", "input": "", "output": "a"}, [U("i"), A("a")]),
    "alpaca with blank input": ({"instruction": "i", "input": " \n", "output": "a"}, [U("i"), A("a")]),
    "alpaca without the column": ({"instruction": "i", "output": "a"}, [U("i"), A("a")]),
    "alpaca with input only": ({"instruction": "", "input": "x", "output": "a"}, [U("x"), A("a")]),
    "alpaca with system and history": (
        {"instruction": "i", "input": "x", "output": "a", "system": "s", "history": [["q", "b"], ["r", "c"]]},
        [S("s"), U("q"), A("b"), U("r"), A("c"), U("i\nx"), A("a")],
    ),
    "alpaca with output and response": ({"instruction": "i", "response": "r", "output": "a"}, [U("i"), A("a")]),
    "dolly": ({"instruction": "i", "context": "x", "response": "a", "category": "qa"}, [U("i\nx"), A("a")]),
    "question and answer": ({"question": "q", "answer": "a\n#### 4"}, [U("q"), A("a\n#### 4")]),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [S("s"), U("q"), A("a")]),
    "query and response": ({"query": "q", "response": "a", "type": "x"}, [U("q"), A("a")]),
    "text": ({"text": " as it is \n"}, [{"role": "text", "content": " as it is \n"}]),
    "a pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [U("q"), A("a")]),
    "tables put together: messages null": (
        {"messages": None, "prompt": "q", "completion": "a", "chosen": None, "rejected": None},
        [U("q"), A("a")],
    ),
    "tables put together: completion null": ({"prompt": "q", "completion": None, "response": "a"}, [U("q"), A("a")]),
    "tables put together: all but a text null": ({"text": "t", "messages": None}, [{"role": "text", "content": "t"}]),
}


@pytest.mark.parametrize("kind", SFT_CASES)
def test_sft_row(tmp_path: Path, kind: str) -> None:
    row, want = SFT_CASES[kind]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [row]))
    assert pool.messages(0) == want == next(pool.all_messages())


HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
PAIR_CASES: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "explicit text": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ([U("q")], [A("a")], [A("b")])),
    "explicit text joined by a space": (
        {"prompt": "q", "chosen": " a", "rejected": " b"},
        ([U("q")], [A("a")], [A("b")]),
    ),
    "explicit messages": (
        {"prompt": [S("s"), U("q")], "chosen": [A("a")], "rejected": [A("b")]},
        ([S("s"), U("q")], [A("a")], [A("b")]),
    ),
    "messages and texts": ({"prompt": [U("q")], "chosen": "a", "rejected": "b"}, ([U("q")], [A("a")], [A("b")])),
    "whole chats beside a prompt": (
        {
            "prompt": "q",
            "chosen": [U("q"), A("a")],
            "rejected": [U("q"), A("b")],
            "score_chosen": 9,
            "score_rejected": 1,
        },
        ([U("q")], [A("a")], [A("b")]),
    ),
    "implicit messages": (
        {"chosen": [U("q"), A("a"), U("r"), A("b")], "rejected": [U("q"), A("a"), U("r"), A("c")]},
        ([U("q"), A("a"), U("r")], [A("b")], [A("c")]),
    ),
    "implicit messages, one goes on": (
        {"chosen": [U("q"), A("a")], "rejected": [U("q"), A("a"), U("r"), A("c")]},
        ([U("q")], [A("a")], [A("a"), U("r"), A("c")]),
    ),
    "implicit messages that part early": (
        {"chosen": [U("q"), A("a"), U("r"), A("b")], "rejected": [U("q"), A("x"), U("r"), A("b")]},
        ([U("q")], [A("a"), U("r"), A("b")], [A("x"), U("r"), A("b")]),
    ),
    "implicit text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is bleak."},
        ([U("The sky is")], [A("blue.")], [A("bleak.")]),
    ),
    "HH-RLHF": (
        {"chosen": HH + " b", "rejected": HH + " c\n"},
        ([U("q"), A("a"), U("r")], [A("b")], [A("c")]),
    ),
    "HH-RLHF with an empty answer in its prompt": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: \n\nHuman: r\n\nAssistant: b",
            "rejected": "\n\nHuman: q\n\nAssistant: \n\nHuman: r\n\nAssistant: c",
        },
        ([U("q"), A(""), U("r")], [A("b")], [A("c")]),
    ),
    "wrapped prompt": (
        {"prompt": HH, "chosen": " b ", "rejected": " c"},
        ([U("q"), A("a"), U("r")], [A("b")], [A("c")]),
    ),
    "SHP, A preferred": (
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 2.0},
        ([U("q")], [A("a")], [A("b")]),
    ),
    "SHP, B preferred": (
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1, "score_B": 5},
        ([U("q")], [A("b")], [A("a")]),
    ),
    "LLaMA-Factory": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ([S("s"), U("q")], [A("a")], [A("b")]),
    ),
    "LLaMA-Factory with OpenAI's messages": (
        {"messages": [S("s"), U("q")], "chosen": A("a"), "rejected": A("b")},
        ([S("s"), U("q")], [A("a")], [A("b")]),
    ),
    "messages that end on a tool": (
        {"messages": [U("q"), A("call"), T("42")], "chosen": A("a"), "rejected": "b"},
        ([U("q"), A("call"), T("42")], [A("a")], [A("b")]),
    ),
    "HH-RLHF with CRLF": (
        {"chosen": (HH + " b").replace("\n", "\r\n"), "rejected": (HH + " c\n").replace("\n", "\r\n")},
        ([U("q"), A("a"), U("r")], [A("b")], [A("c")]),
    ),
    "Stack Exchange": (
        {"title": "t", "body": "b", "chosen": "c", "rejected": "r", "chosen_score": 5, "rejected_score": 0},
        ([U("t\n\nb")], [A("c")], [A("r")]),
    ),
    "SFT row": (
        {"messages": [S("s"), U("q"), A("a"), U("r"), A("b")]},
        ([S("s"), U("q"), A("a"), U("r")], [A("b")], None),
    ),
    "text row": ({"text": "t"}, ([], [{"role": "text", "content": "t"}], None)),
    "pair before messages": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "messages": [U("q"), A("a")]},
        ([U("q")], [A("a")], [A("b")]),
    ),
}


@pytest.mark.parametrize("kind", PAIR_CASES)
def test_pair_row(tmp_path: Path, kind: str) -> None:
    row, want = PAIR_CASES[kind]
    target = load_target(write_rows(tmp_path / "x.jsonl", [row]))
    assert target.pair(0) == want
    assert target.has_pairs == (want[2] is not None)


@pytest.mark.parametrize("name", ALL)
def test_detection_agrees_with_forcing(tmp_path: Path, name: str) -> None:
    dialect = {"prompt-completion-chat": "prompt-completion"}.get(name, name)
    dialect = "preference" if name in ("preference-chat", "preference-implicit") else dialect
    assert detect(good(name, 0), pairs_first=name in PAIRS) == dialect
    if name in SFT:
        assert load_target(write_rows(tmp_path / "x.jsonl", [good(name, 0)])).has_pairs is False


def test_a_pool_takes_messages_where_a_target_takes_the_pair() -> None:
    row = {"messages": [], "prompt": "", "chosen": "", "rejected": ""}
    assert detect(row, pairs_first=False) == "messages"
    assert detect(row, pairs_first=True) == "preference"
    assert detect({"a": 1}, pairs_first=True) is None
    # a chat that stops before the answer, and a plain text, can only be a pair's prompt
    for prompt in ({"messages": [U("q")]}, {"conversation": [{"from": "human", "value": "q"}]}):
        row = prompt | {"chosen": "a", "rejected": "b"}
        assert detect(row, pairs_first=False) == detect(row, pairs_first=True) == "llamafactory-preference"
    assert detect({"text": "t", "chosen": "a", "rejected": "b"}, pairs_first=False) == "preference"
    assert (
        detect({"prompt": "q", "messages": [U("q")], "chosen": "a", "rejected": "b"}, pairs_first=True) == "preference"
    )


def test_implicit_prompt_agrees_with_trl_on_messages(tmp_path: Path) -> None:
    """TRL's extract_prompt gives the same prompt for chats that differ in their last answer."""
    extract = pytest.importorskip("trl.data_utils").extract_prompt
    row = {"chosen": [U("q"), A("a"), U("r"), A("b")], "rejected": [U("q"), A("a"), U("r"), A("c")]}
    theirs = extract(row)
    prompt, chosen, rejected = load_target(write_rows(tmp_path / "x.jsonl", [row])).pair(0)
    assert (prompt, chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
