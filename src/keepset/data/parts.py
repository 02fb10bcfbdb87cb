"""The parts that dialects are read by: a text, a prompt, a completion, and what stands before or beside a prompt."""

from __future__ import annotations

from typing import Any

from keepset.data.fields import PROMPTS, SYSTEM, empty
from keepset.data.reasons import RowProblem
from keepset.data.turns import Turn, looks_hh, read_turns, split_hh, type_name
from keepset.data.written import is_parts, spoken

Row = dict[str, Any]

_OTHERS = {*PROMPTS, "context"} - {"user"}
UNNAMED = ("context", "text", "message", "post", "history", "dialogue", "title", "body", "inputs")
"""Columns that hold a prompt in data whose prompt has another name than `PROMPTS`."""


def text_field(row: Row, *names: str, blank: str | None = None) -> str:
    """Return the first of these columns that is given, as text.

    Raises:
        RowProblem: `missing-column`, `null-field`, `wrong-type`, `chat-as-text`, or the code `blank` if it is blank.
    """
    name = _first(row, names)
    value = row[name]
    if type(value) is not str:
        if value is None:
            raise RowProblem("null-field", f"'{name}' is null")
        raise RowProblem("wrong-type", f"'{name}' is {type_name(value)}, not text")
    if blank is not None and (not value or value.isspace()):
        raise RowProblem(blank, f"'{name}' is empty")
    if spoken(name, value) is not value or (value[:2] == "[{" and is_parts(value)):
        raise RowProblem("chat-as-text", f"'{name}' is text that holds a chat: write it as `messages`")
    return value


def need(row: Row, *names: str) -> tuple[str, Any]:
    """Return the name and the value of the first of these columns that is given, a chat written as text read.

    Raises:
        RowProblem: `missing-column`, `null-field`, `chat-as-text`.
    """
    name = _first(row, names)
    if row[name] is None:
        raise RowProblem("null-field", f"'{name}' is null")
    return name, spoken(name, row[name])


def _first(row: Row, names: tuple[str, ...]) -> str:
    """Return the first of these columns that is given; one that is null only if there is no other."""
    there = [name for name in names if name in row]
    if not there:
        raise RowProblem("missing-column", f"no column '{names[0]}'")
    return next((name for name in there if row[name] is not None), there[0])


def read_prompt(name: str, value: Any) -> list[Turn]:
    """Read a prompt that is text or messages."""
    if type(value) is list:
        return read_turns(value, name)
    text = text_field({name: value}, name, blank="empty-prompt")
    return split_hh(text, prompt=True) if looks_hh(text) else [("user", text)]


def read_completion(name: str, value: Any, *, strip: bool = False) -> list[Turn]:
    """Read a completion that is text, one message or messages."""
    if type(value) is list:
        return read_turns(value, name)
    if type(value) is dict:
        return read_turns([value], name)
    text = text_field({name: value}, name, blank="empty-completion")
    if strip:
        return [("assistant", text.strip())]
    return [("assistant", text[1:] if text[0] == " " and text[1:2] != " " else text)]


def is_hh(value: Any) -> bool:
    """Tell whether a column holds an HH-RLHF dialogue as text."""
    return type(value) is str and looks_hh(value)


def input_column(row: Row) -> str:
    """Name the column that is joined to `instruction`."""
    return "input" if row.get("input") is not None or row.get("context") is None else "context"


def instruction_text(row: Row) -> str:
    """Join `instruction` and `input` (or `context`) by a line break; either may be empty, not both."""
    instruction = text_field(row, "instruction")
    name = input_column(row)
    given = "" if row.get(name) is None else text_field(row, name)
    if not given or given.isspace():
        given, instruction = instruction, ""
    prompt = f"{instruction}\n{given}" if instruction and not instruction.isspace() else given
    if not prompt or prompt.isspace():
        raise RowProblem("empty-prompt", "'instruction' and 'input' are both empty")
    return prompt


def with_history(row: Row, prompt: list[Turn]) -> list[Turn]:
    """Put LLaMA-Factory's `history` (pairs of texts) before a prompt of one text."""
    if "history" not in row or empty(row["history"]):
        return prompt
    value = spoken("history", row["history"])
    if [role for role, _ in prompt] != ["user"]:
        raise RowProblem("unused-field", "'history' stands beside a prompt that is a chat itself: put it into the chat")
    turns: list[Turn] = []
    for k, pair in enumerate(value if type(value) is list else [None]):
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise RowProblem("wrong-type", f"'history[{k}]' is not a pair of texts")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns + prompt


def folded(text: str) -> str:
    """Return a text with each run of white space as one space."""
    return " ".join(text.split())


def one_prompt(row: Row, prompt: list[Turn], *used: str) -> None:
    """Refuse a row with a second prompt-like column whose text the prompt neither holds nor stands in.

    `user` is not looked at: beside a prompt it is mostly somebody's name.
    """
    for name in row:
        if name not in _OTHERS or name in used or type(row[name]) is not str or empty(row[name]):
            continue
        whole, other = folded("\n".join(content for _, content in prompt)), folded(row[name])
        instruction = folded(row["instruction"]) if used[0] == "instruction" else ""
        if other not in whole and (instruction or whole) not in other:
            raise RowProblem(
                "two-prompts", f"'{name}' is not in the prompt ('{used[0]}') and would be lost: join them, or drop it"
            )


def no_other_text(row: Row, shared: str) -> None:
    """Refuse a pair whose prompt would be what both texts begin with, although another column may hold it.

    That is a chat, `UNNAMED`, or a text of four words or more, unless `shared` holds it.
    """
    for name, value in row.items():
        if name in ("chosen", "rejected", *SYSTEM) or empty(value):
            continue
        if type(value) is list:
            held = type(value[0]) is not dict or not {"role", "from"} & value[0].keys()
        else:
            wordy = type(value) is str and (name in UNNAMED or len(value.split()) >= 4)
            held = not wordy or folded(value) in folded(shared)
        if not held:
            raise RowProblem(
                "two-prompts", f"'{name}' may be the prompt and would be lost: name it `prompt`, or drop it"
            )


def not_repeated(prompt: Any, *sides: Any) -> None:
    """Refuse texts that look like prompt and answer in one, beside the prompt: the prompt would stand twice."""
    if type(prompt) is not str or not all(type(side) is str for side in sides):
        return
    start = prompt.strip()
    rests = [side.strip()[len(start) :] for side in sides if start and side.strip().startswith(start)]
    asks = len(start.split()) >= 5 or start.endswith(("?", ":"))
    if len(rests) == len(sides) and (asks or all(rest[:1] == "\n" for rest in rests)):
        raise RowProblem("two-prompts", "'chosen' and 'rejected' both begin with the whole prompt: take it off them")


def with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """Put the text of a system column in front; plain text must hold it already."""
    for name in SYSTEM:
        if name not in row or empty(row[name]):
            continue
        text = text_field(row, name)
        role, first = turns[0]
        if role == "text":
            if folded(text) not in folded(first):
                raise RowProblem("two-system-texts", f"'{name}' is not in 'text', and would be lost")
        elif role != "system":
            turns = [("system", text), *turns]
        elif first.strip() != text.strip():
            raise RowProblem("two-system-texts", f"'{name}' is not the chat's own system message")
    return turns
