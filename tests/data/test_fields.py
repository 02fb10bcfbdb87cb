"""Fields that change what a row means: every name of the table in every dialect, by hand-worked values."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_rows import good, write_rows
from keepset.data import REASONS, FileRefused, load_pool, load_target, write_subset
from keepset.data.dialects import as_pair, as_sft
from keepset.data.fields import COLUMNS, EVERY, FIELDS, PAIRS, SYSTEM, carried, flag, table
from keepset.data.reasons import RowProblem
from keepset.errors import DataError
from keepset.model.encode import Encoder
from keepset.recipe import DataSpec, ModelSpec
from keepset.report.inspect import inspect_data, print_inspection

ROOT = Path(__file__).parents[2]
KEPT = ""  # the row is used, and reads as it does without the field

# What comes of a value, by hand: (where, first name, first dialect) of a line of the table -> value -> reason, or KEPT.
EMPTY = [(None, KEPT), ("", KEPT), ([], KEPT), ({}, KEPT), ("[]", KEPT), ("null", KEPT), ("[null, []]", KEPT),
         ('{"bytes": null, "path": ""}', KEPT), ("{'bytes': None, 'path': None}", KEPT)]  # fmt: skip
UNWANTED = [
    (False, "undesirable"),
    ("False", "undesirable"),
    ("Undesirable", "undesirable"),
    (True, KEPT),
    ("true", KEPT),
    (None, KEPT),
    ("good", KEPT),
]
NOT_TRAINED = [(False, "not-trained"), ("false", "not-trained"), (True, KEPT), (None, KEPT)]
ZERO = [(0, "not-trained"), (0.0, "not-trained"), ("0", "not-trained"), (1, KEPT), ("1.0", KEPT)]
MEDIA = [*EMPTY, ([None], KEPT), ({"bytes": None, "path": None}, KEPT), (["a.png"], "non-text-content"),
         ("a.png", "non-text-content"), ({"bytes": "aGk=", "path": None}, "non-text-content")]  # fmt: skip
LIST = [([1, 2], "unused-field"), ([], KEPT), (None, KEPT), (3, KEPT)]
ROWS: dict[tuple[str, str], list[tuple[Any, str]]] = {
    ("history", "messages"): [*EMPTY, ([["a", "b"]], "unused-field"), ("what was said", "unused-field")],
    ("tools", "messages"): [*EMPTY, ([{"name": "f"}], "tool-calls"), ('[{"name": "f"}]', "tool-calls")],
    ("image", "messages"): MEDIA,
    ("label", "messages"): [*UNWANTED, (0, "undesirable"), ("0", "undesirable"), (1, KEPT), (4, KEPT), (0.5, KEPT)],
    ("label", "text"): [*UNWANTED, (0, KEPT), (1, KEPT), (4, KEPT)],
    ("weight", "messages"): [*NOT_TRAINED, *ZERO, (0.5, "fractional-weight"), ("heavy", "fractional-weight")],
    ("train", "messages"): [*NOT_TRAINED, *ZERO, ("a train", KEPT)],
    ("loss", "messages"): [*NOT_TRAINED, (2.5, KEPT), (0.0, KEPT)],
    ("masked", "messages"): [(True, "not-trained"), (1, "not-trained"), (False, KEPT), (0, KEPT), (None, KEPT)],
    ("mask", "messages"): [("User", KEPT), (None, KEPT), ("Assistant", "unused-field"), (True, "unused-field"),
                           (False, "unused-field"), ([0, 1], "unused-field")],
    ("input_ids", "messages"): LIST,
    ("labels", "messages"): LIST,
    ("chat_template_kwargs", "messages"): [*EMPTY, ({"enable_thinking": False}, KEPT),
                                           ({"enable_thinking": True}, "unused-field")],
    ("chosen_score", "preference"): [(None, KEPT), (4, KEPT), ("n/a", KEPT)],
    ("split", "messages"): [("test", KEPT), ("train", KEPT), (None, KEPT)],
    ("reasoning_content", "messages"): [("First I think.", KEPT), (None, KEPT)],
    ("rejected_response", "messages"): [("no", KEPT), (None, KEPT)],
    ("margin", "messages"): [(0.5, KEPT), ("x", KEPT), (None, KEPT)],
}  # fmt: skip
# The lines whose values change the prompt have tests of their own below.
OWN = {("system", "messages"), ("system", "text"), ("history", "prompt-completion"), ("prompt", "preference"),
       ("prompt", "prompt-completion"), ("context", "preference")}  # fmt: skip


def key(field: Any) -> tuple[str, str]:
    return field.names[0], field.dialects[0]


def test_the_table_is_complete_and_every_line_of_it_is_tried() -> None:
    rows = [f for f in FIELDS if f.where == "row"]
    assert {key(f) for f in rows} == set(ROWS) | OWN and not set(ROWS) & OWN
    assert {f.names[0] for f in FIELDS if f.where == "message"} == set(MESSAGES)
    for dialect in EVERY:
        names = [name for f in rows if dialect in f.dialects for name in f.names]
        assert len(names) == len(set(names)), dialect
    names = [name for f in FIELDS if f.where == "message" for name in f.names]
    assert len(names) == len(set(names))
    assert set(COLUMNS) == set(EVERY)
    assert {f.what for f in FIELDS} == {"honoured", "refused", "carried"}


CASES = [(key(f), name, dialect) for f in FIELDS if f.where == "row" and key(f) in ROWS
         for name in f.names for dialect in f.dialects]  # fmt: skip


@pytest.mark.parametrize(("line", "name", "dialect"), CASES, ids=[f"{n}-{d}" for _, n, d in CASES])
def test_columns(tmp_path: Path, line: tuple[str, str], name: str, dialect: str) -> None:
    """Pool and target refuse the same rows; a row that is kept reads as it does without the column."""
    values = ROWS[line]
    plain = [good(dialect, k) for k in range(len(values))]
    path = write_rows(tmp_path / "x.jsonl", [row | {name: v} for row, (v, _) in zip(plain, values, strict=True)])
    bare = load_pool(DataSpec(path=str(write_rows(tmp_path / "y.jsonl", plain)), format=dialect))
    want = {k + 1: reason for k, (_, reason) in enumerate(values) if reason}
    pool = load_pool(DataSpec(path=str(path), format=dialect), allow_empty=True)
    target = load_target(DataSpec(path=str(path), format=dialect), allow_empty=True)
    assert {q.line: q.reason for q in pool.quarantine} == want == {q.line: q.reason for q in target.quarantine}
    assert all(f"'{name}'" in q.detail for q in pool.quarantine)
    assert pool.ids.tolist() == [i for k, i in enumerate(bare.ids) if k + 1 not in want]
    assert len(target) == len(pool)
    # rows go out as they came in, the field with them
    if len(pool):
        write_subset(pool, range(len(pool)), tmp_path / "out.jsonl")
        out = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row[name] for row in out] == [v for v, reason in values if not reason]


# ------------------------------------------------------------------------------------------------- keys of messages

FOLLOWED = [(0, "context"), (0.0, "context"), (False, "context"), ("0", "context"), ("false", "context"),
            (1, KEPT), (True, KEPT), ("1", KEPT), (None, KEPT), (0.5, "fractional-weight"),
            ([0, 1], "fractional-weight")]  # fmt: skip
MESSAGES: dict[str, list[tuple[Any, str]]] = {
    "weight": FOLLOWED,
    "train": FOLLOWED,
    "masked": [(True, "context"), (1, "context"), (False, KEPT), (0, KEPT), (None, KEPT), (0.5, "fractional-weight")],
    "mask": [(True, "unused-field"), (False, "unused-field"), (0, "unused-field"), (None, KEPT)],
    "train_detail": [*EMPTY, ([{"begin_offset": 0, "end_offset": 2, "train": False}], "unused-field")],
    "reasoning_content": [*EMPTY, ("Let me see.", "reasoning-field")],
    "tool_calls": [*EMPTY, ([{"id": "1"}], "tool-calls"), ({"name": "f"}, "tool-calls"),
                   ({"name": None, "arguments": None}, KEPT)],
    "image": MEDIA,
    "refusal": [*EMPTY, ("I can't.", "unused-field")],
    "channel": [*EMPTY, ("analysis", "unused-field")],
    "replies": [*EMPTY, ([{"text": "a"}], "message-tree")],
    "name": [("Ann", KEPT), (None, KEPT)],
}  # fmt: skip
KEYS = [(f.names[0], name) for f in FIELDS if f.where == "message" for name in f.names]


def chat_row(dialect: str, k: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Question, the answer that holds the extra keys, a further question and its answer."""
    first = [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": f"a{k}"} | extra]
    more = {"role": "user", "content": "r"}
    last = [{"role": "assistant", "content": text} for text in ("b", "c")]
    share = [{"from": m["role"], "value": m["content"]} | {x: m[x] for x in m.keys() & extra.keys()}
             for m in [*first, more, last[0]]]  # fmt: skip
    return {
        "messages": {"messages": [*first, more, last[0]]},
        "sharegpt": {"conversations": share},
        "prompt-completion": {"prompt": [*first, more], "completion": last[:1]},
        "preference": {"prompt": [*first, more], "chosen": last[:1], "rejected": last[1:]},
        "llamafactory-preference": {"conversations": share[:3], "chosen": last[0], "rejected": last[1]},
    }[dialect]


@pytest.mark.parametrize(
    "dialect", ["messages", "sharegpt", "prompt-completion", "preference", "llamafactory-preference"]
)
@pytest.mark.parametrize(("line", "name"), KEYS, ids=[name for _, name in KEYS])
def test_message_keys(tmp_path: Path, line: str, name: str, dialect: str) -> None:
    values = MESSAGES[line]
    path = write_rows(tmp_path / "x.jsonl", [chat_row(dialect, k, {name: v}) for k, (v, _) in enumerate(values)])
    plain = write_rows(tmp_path / "y.jsonl", [chat_row(dialect, k, {}) for k in range(len(values))])
    bare = load_pool(plain)
    pool, target = load_pool(path, allow_empty=True), load_target(path, allow_empty=True)
    want = {k + 1: reason for k, (_, reason) in enumerate(values) if reason not in (KEPT, "context")}
    assert {q.line: q.reason for q in pool.quarantine} == want == {q.line: q.reason for q in target.quarantine}
    for i, line_number in enumerate(pool.table["line"].to_pylist()):
        k = line_number - 1
        chat = [
            {"role": "user", "content": f"q{k}"},
            {"role": "assistant", "content": f"a{k}"} | ({"train": False} if values[k][1] == "context" else {}),
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"},
        ]
        assert pool.messages(i) == chat
        assert target.pair(i)[0] == chat[:3] and target.pair(i)[1] == chat[3:]
        # ids take the mark into account where it is set, and only there
        assert (pool.ids[i] == bare.ids[k]) == (values[k][1] == KEPT)
    assert list(pool.all_messages()) == [pool.messages(i) for i in range(len(pool))]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}], "trained-prompt"),
        ([{"role": "user", "content": "q", "loss": 1}, {"role": "assistant", "content": "a"}], "trained-prompt"),
        ([{"role": "user", "content": "q", "masked": False}, {"role": "assistant", "content": "a"}], "trained-prompt"),
        ([{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}], KEPT),
        ([{"role": "user", "content": "q", "train": False}, {"role": "assistant", "content": "a"}], KEPT),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}], "not-trained"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1, "train": False}],
            "unused-field",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "q", "train": True}]},
          {"role": "assistant", "content": [{"type": "text", "text": "a", "train": None}]}], KEPT),
        ([{"role": "user", "content": "q"},
          {"role": "assistant", "content": [{"type": "text", "text": "a", "weight": 0}]}], "unused-field"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "weight": 0},
          {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}], KEPT),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
          {"role": "assistant", "content": "b", "weight": 0}], "same-role-twice"),
    ],
)  # fmt: skip
def test_marks_on_other_speakers_and_against_each_other(tmp_path: Path, messages: Any, reason: str) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [{"messages": messages}]), allow_empty=True)
    assert [q.reason for q in pool.quarantine] == ([reason] if reason else [])


def test_a_last_answer_that_is_context() -> None:
    """A pool keeps the row for its first answer; a target, which takes the last, refuses it."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "weight": 0}]  # fmt: skip
    assert as_sft("messages")({"messages": chat})[-1] == ("assistant-context", "b")
    with pytest.raises(Exception, match="not-trained"):
        as_pair("messages")({"messages": chat})
    with pytest.raises(Exception, match="not-trained"):
        as_pair("preference")({"prompt": "q", "chosen": [chat[3]], "rejected": "c"})


def test_context_is_not_supervised_and_its_end_of_turn_neither(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [
        {"role": "user", "content": "two and two"}, {"role": "assistant", "content": "five surely", "weight": w},
        {"role": "user", "content": "again"}, {"role": "assistant", "content": "four", "weight": 1},
    ]} for w in (0, 1)]  # fmt: skip
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    encoder = Encoder(tokenizer, ModelSpec(chat_template="plain"))
    context, both = (encoder.encode(pool.messages(i)) for i in range(2))
    assert context.input_ids.tolist() == both.input_ids.tolist()
    told = [
        "".join(encoder.tokenizer.decode(row.input_ids[row.supervised].tolist()).split()) for row in (context, both)
    ]
    eos = encoder.tokenizer.eos_token
    assert told == [f"four{eos}", f"fivesurely{eos}four{eos}"]
    last = Encoder(tokenizer, ModelSpec(chat_template="plain", supervise="last"))
    assert last.encode(pool.messages(0)).supervised.tolist() == context.supervised.tolist()


def test_context_in_other_dialects(tmp_path: Path) -> None:
    """The mark goes along where the dialect has a word for it, else the row is refused; ids stay."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]  # fmt: skip
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [{"messages": chat}]))
    for to in ("messages", "sharegpt", "prompt-completion"):
        write_subset(pool, [0], tmp_path / "out.jsonl", to=to)
        again = load_pool(tmp_path / "out.jsonl")
        assert again.dialect == to and again.ids.tolist() == pool.ids.tolist()
    with pytest.raises(DataError, match="Alpaca"):
        write_subset(pool, [0], tmp_path / "out.jsonl", to="alpaca")
    last = load_pool(write_rows(tmp_path / "y.jsonl", [{"messages": [*chat[:1], chat[3], chat[2], chat[1]]}]))
    with pytest.raises(DataError, match="last answer"):
        write_subset(last, [0], tmp_path / "out.jsonl", to="prompt-completion")


# ------------------------------------------------------------------------------------------------- system, history


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("dialect", [d for d in EVERY if d != "text"])
def test_a_system_column_leads_every_dialect(tmp_path: Path, dialect: str, name: str) -> None:
    plain = good(dialect, 3)
    if dialect == "messages":
        plain["messages"] = plain["messages"][1:]
    rows = [plain | {name: value} for value in ("Be a sailor.", None, " ", 3)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    pool, target = load_pool(path), load_target(path)
    bare = load_pool(write_rows(tmp_path / "y.jsonl", [plain]))
    system = {"role": "system", "content": "Be a sailor."}
    assert pool.messages(0) == [system, *bare.messages(0)]
    assert target.pair(0)[0][0] == system
    assert pool.messages(1) == pool.messages(2) == bare.messages(0)
    assert [(q.line, q.reason) for q in pool.quarantine] == [(4, "wrong-type")]


def test_two_system_texts(tmp_path: Path) -> None:
    rows = [good("messages", k) | {"system": s} for k, s in enumerate(("Be brief.", " Be brief. ", "Be long."))]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    assert len(pool) == 2 and [(q.line, q.reason) for q in pool.quarantine] == [(3, "two-system-texts")]
    assert [m["role"] for m in pool.messages(1)] == ["system", "user", "assistant"]
    rows = [{"text": "Be brief.\n\nOne and one is two.", "system": s} for s in ("Be  brief.", "", "Be long.")]
    pool = load_pool(write_rows(tmp_path / "y.jsonl", rows))
    assert [(q.line, q.reason) for q in pool.quarantine] == [(3, "two-system-texts")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"instruction": "q", "input": "x", "output": "a"}, "q\nx"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
        ({"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"}, "q\nx"),
    ],
)
def test_history_stands_before_a_prompt_of_one_text(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    rows = [row | {"history": h} for h in ([["h", "i"]], '[["h", "i"]]', [], "[]", "said", [["h"]])]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    asked = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}]
    whole = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}, *asked]
    assert list(pool.all_messages()) == [whole, whole, asked, asked]
    assert [(q.line, q.reason) for q in pool.quarantine] == [(5, "wrong-type"), (6, "wrong-type")]


# ------------------------------------------------------------------------------------------------- prompts


def U(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def A(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


S = {"role": "system", "content": "s"}
SIDES = {"chosen": "The spider has eight legs.", "rejected": "The spider has six legs."}
HH_PROMPT = "\n\nHuman: q\n\nAssistant:"
PROMPT_CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | str]] = {
    "prompt": ({"prompt": "q"}, [U("q")]),
    "question": ({"question": "q"}, [U("q")]),
    "query": ({"query": "q"}, [U("q")]),
    "problem": ({"problem": "q"}, [U("q")]),
    "user": ({"user": "q"}, [U("q")]),
    "input": ({"system": "s", "input": "q"}, [S, U("q")]),
    "instruction": ({"instruction": "q"}, [U("q")]),
    "instruction and input": ({"instruction": "q", "input": "x"}, [U("q\nx")]),
    "instruction and context": ({"instruction": "q", "context": "x"}, [U("q\nx")]),
    "instruction that is empty": ({"instruction": "", "input": "x"}, [U("x")]),
    "question as messages": ({"question": [S, U("q")]}, [S, U("q")]),
    "question as JSON": ({"question": json.dumps([S, U("q")])}, [S, U("q")]),
    "null question": ({"question": None}, "null-field"),
    "empty question": ({"question": ""}, "empty-prompt"),
    "an empty one and a full one": ({"question": "", "query": "q"}, [U("q")]),
    "a number": ({"question": 3}, "wrong-type"),
    "none": ({}, [U("The spider has")]),
    "none, with notes": ({"source": "web", "category": "open qa", "n": 3, "tags": ["a"], "id": "The spider has"},
                         [U("The spider has")]),
    "a context alone": ({"context": "How many legs?"}, "two-prompts"),
    "a post": ({"post": "Legs?"}, "two-prompts"),
    "a text": ({"text": "Legs?"}, "two-prompts"),
    "a column of words": ({"asked": "How many legs has it?"}, "two-prompts"),
    "a column that the beginning holds": ({"context": " spider  has "}, [U("The spider has")]),
    "a chat": ({"dialog": [U("q")]}, "two-prompts"),
    "a null prompt and a question": ({"prompt": None, "instruction": "q", "input": None, "context": "x"}, "null-field"),
    "a null input and a context": ({"instruction": "q", "input": None, "context": "x"}, [U("q\nx")]),
    "user beside a prompt is a name": ({"prompt": "q", "user": "Ann"}, [U("q")]),
    "two prompts": ({"prompt": "q", "question": "r"}, "two-prompts"),
    "two prompts of one text": ({"prompt": "Answer: what is  q?", "question": "what is q?"},
                                [U("Answer: what is  q?")]),
    "context beside a question": ({"question": "q", "context": "much to read"}, "two-prompts"),
    "instruction, input and another context": ({"instruction": "q", "input": "x", "context": "y"}, "two-prompts"),
    "instruction in a template": ({"prompt": "q", "instruction": "### Instruction: q ###"}, [U("q")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPT_CASES)
def test_the_prompt_of_a_pair(tmp_path: Path, kind: str) -> None:
    row, want = PROMPT_CASES[kind]
    path = write_rows(tmp_path / "x.jsonl", [row | SIDES])
    target = load_target(path, allow_empty=True)
    if isinstance(want, str):
        assert [q.reason for q in target.quarantine] == [want]
        return
    told = ("eight legs.", "six legs.") if want == [U("The spider has")] else tuple(SIDES.values())
    assert target.pair(0) == (want, [A(told[0])], [A(told[1])])
    assert load_pool(path).messages(0) == [*want, A(told[0])]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "q", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, [U("q")]),
        ({"prompt": [U("q")], "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, [U("q")]),
        ({"prompt": [U("q")], "chosen": [A("a")], "rejected": [A("b")]}, [U("q")]),
        ({"prompt": [U("q")], "chosen": A("a"), "rejected": A("b")}, [U("q")]),
        ({"prompt": [S, U("q")], "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, [S, U("q")]),
        ({"prompt": "r", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, "different-prompts"),
        ({"prompt": [U("r"), A("x"), U("q")], "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]},
         "different-prompts"),
        ({"question": "anything", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, [U("q")]),
        ({"prompt": HH_PROMPT, "chosen": HH_PROMPT + " a", "rejected": HH_PROMPT + " b"}, [U("q")]),
        ({"prompt": HH_PROMPT, "chosen": " a", "rejected": " b"}, [U("q")]),
        ({"prompt": "\n\nHuman: r\n\nAssistant:", "chosen": HH_PROMPT + " a", "rejected": HH_PROMPT + " b"},
         "different-prompts"),
        ({"prompt": "What is it that you want?", "chosen": "What is it that you want? a",
          "rejected": "What is it that you want? b"}, "two-prompts"),
        ({"prompt": "q", "chosen": "q\na", "rejected": "q\nb"}, "two-prompts"),
        ({"prompt": "q?", "chosen": "q? a", "rejected": "q? b"}, "two-prompts"),
        ({"prompt": [U("q")], "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")], "history": [["x", "y"]]},
         "unused-field"),
    ],
)  # fmt: skip
def test_answers_alone_and_whole_dialogues(tmp_path: Path, row: dict[str, Any], want: Any) -> None:
    target = load_target(write_rows(tmp_path / "x.jsonl", [row]), allow_empty=True)
    if isinstance(want, str):
        assert [q.reason for q in target.quarantine] == [want]
    else:
        assert target.pair(0) == (want, [A("a")], [A("b")])


PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x.png"}}]


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1]])
def test_content_parts_written_as_text_are_no_content(tmp_path: Path, parts: list[Any]) -> None:
    text = json.dumps(parts)
    rows = [{"messages": [U("q"), A(text)]}, {"messages": [U(text), A("a")]}]
    rows += [{"messages": [U("q"), A(other)]} for other in ('[{"type": "cat"}]', text + ".", '[{"type": "text"}]')]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    assert [(q.line, q.reason) for q in pool.quarantine] == [(1, "chat-as-text"), (2, "chat-as-text")]
    rows = [{"prompt": "q", "completion": text}, {"prompt": text, "completion": "a"}]
    pool = load_pool(write_rows(tmp_path / "y.jsonl", rows), allow_empty=True)
    assert [q.reason for q in pool.quarantine] == ["chat-as-text"] * 2


def test_a_message_with_two_texts(tmp_path: Path) -> None:
    rows = [{"messages": [U("q") | {"value": value}, A("a")]} for value in ("q", None, "r")]
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows))
    assert [(q.line, q.reason) for q in pool.quarantine] == [(3, "unused-field")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": "a", "context": "much to read"}, "two-prompts"),
        ({"question": "q", "answer": "a", "input": "much to read"}, "two-prompts"),
        ({"question": "q with more", "answer": "a", "query": "q"}, KEPT),
        ({"question": "q", "answer": "a", "context": None}, KEPT),
        ({"prompt": "p", "completion": "a", "instruction": "i"}, "two-prompts"),
        ({"prompt": "Say: i", "completion": "a", "instruction": "i"}, KEPT),
        ({"prompt": "p", "completion": "a", "user": "Ann"}, KEPT),
        ({"instruction": "i", "output": "a", "query": "q?"}, "two-prompts"),
        ({"instruction": "i", "input": "x", "output": "a", "prompt": "### i ### x ###"}, KEPT),
        ({"instruction": "i", "input": "x", "output": "a", "context": "much"}, "two-prompts"),
        ({"messages": [U("q"), A("a")], "prompt": "another"}, KEPT),
    ],
)
def test_a_second_prompt_beside_an_answer(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [row]), allow_empty=True)
    assert [q.reason for q in pool.quarantine] == ([reason] if reason else [])


# ------------------------------------------------------------------------------------------------- chats as text

CHAT = [U('say "it\'s"\n'), A("[1, 2]")]
WRITINGS = {"JSON": json.dumps, "indented JSON": lambda v: json.dumps(v, indent=1), "Python": repr,
            "JSON in JSON": lambda v: json.dumps(json.dumps(v)),
            "with blanks": lambda v: f"\n {json.dumps(v)} "}  # fmt: skip
SPOKEN = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": "[1, 2]"}]},
    "prompt-completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "one message": {"prompt": CHAT[:1], "completion": CHAT[1]},
    "preference": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [A("no")]},
    "whole chats": {"chosen": CHAT, "rejected": [CHAT[0], A("no")]},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("how", WRITINGS)
@pytest.mark.parametrize("dialect", SPOKEN)
def test_chats_written_as_text(tmp_path: Path, dialect: str, how: str, suffix: str) -> None:
    rows = [{name: WRITINGS[how](value) for name, value in SPOKEN[dialect].items()}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    if suffix == ".csv":
        write_subset(load_pool(path), [0], tmp_path / "x.csv")
        path = tmp_path / "x.csv"
    assert load_pool(path).messages(0) == CHAT
    if "chosen" in rows[0]:
        assert load_target(path).pair(0) == (CHAT[:1], CHAT[1:], [A("no")])


@pytest.mark.parametrize(
    "answer",
    ["[1, 2, 3]", '{"a": 1}', "[]", "{}", '{"role": "CEO", "company": "X"}', '[{"from": "here", "to": "there"}]',
     "{'a': nan}", '{"a": 1, "a": 2}', '"quoted"', "[x] done", '{"role": "x", "content": 3}'],
)  # fmt: skip
def test_other_text_in_brackets_is_an_answer(tmp_path: Path, answer: str) -> None:
    rows = [{"prompt": "q", "completion": answer}, {"question": "q", "answer": answer}]
    for k, row in enumerate(rows):
        assert load_pool(write_rows(tmp_path / f"{k}.jsonl", [row])).messages(0) == [U("q"), A(answer)]


UNREADABLE = {
    "cut off": json.dumps(CHAT)[:-4],
    "NumPy's way, no commas": "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]",
    "a call": "array([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}], dtype=object)",
    "a name in it": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': nan}]",
    "inside another object": json.dumps({"messages": CHAT}),
    "too long for Python text": repr([U("x" * 2**20)]),
    "too deep": "[" * 300 + repr(U("q")) + "]" * 300,
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_chats_as_text_that_cant_be_read_are_never_answers(tmp_path: Path, how: str) -> None:
    rows = [{"prompt": "q", "completion": UNREADABLE[how]}, {"prompt": "q", "chosen": UNREADABLE[how], "rejected": "b"},
            {"question": "q", "answer": UNREADABLE[how]}, {"instruction": "q", "output": UNREADABLE[how]},
            {"text": UNREADABLE[how]}]  # fmt: skip
    for k, row in enumerate(rows):
        pool = load_pool(write_rows(tmp_path / f"{k}.jsonl", [row]), allow_empty=True)
        assert [q.reason for q in pool.quarantine] == ["chat-as-text"], row


def test_a_readable_chat_in_a_column_of_text_is_no_answer_either(tmp_path: Path) -> None:
    for k, row in enumerate([{"question": "q", "answer": repr(CHAT)}, {"text": json.dumps(CHAT)}]):
        pool = load_pool(write_rows(tmp_path / f"{k}.jsonl", [row]), allow_empty=True)
        assert [q.reason for q in pool.quarantine] == ["chat-as-text"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"role": "user", "role": "user", "content": "q"}]', "duplicate-key"),
        (r"[{'role': 'user', 'content': 'a\ud800'}]", "lone-surrogate"),
        (r"[{'role': 'user', 'content': 'a\x00'}]", "nul-character"),
        (r"[{'role': 'wizard', 'content': 'a'}]", "unknown-role"),
        ("just words", "wrong-type"),
    ],
)
def test_bad_chats_as_text_say_why(tmp_path: Path, text: str, reason: str) -> None:
    pool = load_pool(write_rows(tmp_path / "x.jsonl", [{"messages": text}]), allow_empty=True)
    assert [q.reason for q in pool.quarantine] == [reason]


# ------------------------------------------------------------------------------------------------- trees, inspect, docs


def test_rows_of_trees_are_refused_by_name(tmp_path: Path) -> None:
    rows = [{"message_id": "m1", "parent_id": None, "role": "prompter", "text": "q"},
            {"message_id": "m2", "parent_id": "m1", "role": "assistant", "text": "a"}]  # fmt: skip
    pool = load_pool(write_rows(tmp_path / "x.jsonl", rows), allow_empty=True)
    assert [q.reason for q in pool.quarantine] == ["message-tree"] * 2
    tree = {"message_tree_id": "m1", "tree_state": "ready", "prompt": rows[0] | {"replies": [rows[1]]}}
    with pytest.raises(FileRefused, match=r"OASST.*\[message-tree\]$"):
        load_pool(write_rows(tmp_path / "y.jsonl", [tree]))


class Watched(dict[str, Any]):
    """A row that remembers which of its columns were read."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name in self:
            self.read.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("dialect", EVERY)
def test_what_is_not_carried_along_is_what_is_read(dialect: str) -> None:
    """`carried` names exactly the columns that no code looks at."""
    row = Watched(good(dialect, 1) | {"note": "n", "tags": ["x"], "kind": 3})
    (as_pair if dialect in PAIRS else as_sft)(dialect)(row)
    assert set(carried(row, dialect)) == {"note", "tags", "kind", "tag"}
    assert row.read == set(row) - {"note", "tags", "kind", "tag"}


def test_inspect_lists_what_it_ignores(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [U("q") | {"name": "Ann"}, A(f"a{k}") | {"weight": 1}], "split": "test", "id": k, "label": True,
         "tools": [], "prompt": "q", "unused": None} for k in range(3)
    ]  # fmt: skip
    rows += [{"messages": [U("late"), A("b")], "late": False}] + [{"messages": [U("q"), A("c")]} for _ in range(70)]
    rows.append({"messages": [U("last"), A("d")], "last": 0, "label": "sports"})
    facts = inspect_data(write_rows(tmp_path / "x.jsonl", rows))
    assert facts["carried"] == {
        "columns": {"split": 3, "id": 3, "prompt": 3, "late": 1, "last": 1, "label": 1},
        "message_keys": {"name": 3},
    }
    console = Console(file=io.StringIO(), width=300)
    print_inspection(facts, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "columns carried along, not used: split (3 rows; no row is left out for it: filter the file), id (3" in printed
    )
    assert "message keys carried along, not used: name (3 rows; not rendered)" in printed


def test_flags() -> None:
    assert [flag(v) for v in (True, 1, 1.0, "1", "True", " true ")] == [True] * 6
    assert [flag(v) for v in (False, 0, 0.0, "0", "FALSE", "0.0")] == [False] * 6
    assert [flag(v) for v in (None, 2, -1, 0.5, "yes", "", [], {}, float("nan"))] == [None] * 9


def test_the_docs_hold_the_table() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert table() in page, (
        "put the output of `python -c 'from keepset.data.fields import table; print(table())'` there"
    )
    for reason in re.findall(r"`([a-z]+(?:-[a-z]+)+)`", page.split("## Reasons")[1]):
        assert reason in REASONS


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.sampled_from(
        ["", "0", "true", "a", "user", "[]", "[{", "[{'role': 'user', 'content': 'q'}]", '{"role": "a", "content": 1}']
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "replies", *MESSAGES]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
COLUMN_NAMES = sorted({name for f in FIELDS if f.where == "row" for name in f.names} | {"message_id", "parent_id"})


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.dictionaries(st.sampled_from(COLUMN_NAMES), anything, max_size=3),
    st.dictionaries(st.sampled_from([name for _, name in KEYS]), anything, max_size=2),
)
def test_any_value_is_read_or_refused(dialect: str, columns: dict[str, Any], keys: dict[str, Any]) -> None:
    """Whatever a field holds, the row is read or refused, alike as a pool's and a target's, and alike twice."""
    row = good(dialect, 1)
    for name in ("messages", "conversations"):
        if name in row:
            row[name][-1] |= keys
    row |= columns
    outcomes = []
    for read in (as_sft(dialect), as_pair(dialect), as_sft(dialect)):
        try:
            found = read(row)
            outcomes.append([t for part in found[:2] for t in part] if isinstance(found, tuple) else found)
        except RowProblem as bad:
            assert bad.reason in REASONS
            outcomes.append(bad.reason)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    if not isinstance(outcomes[0], str):
        assert set(carried(row, dialect)) <= set(row)
