"""Chats: lists of (role, content) turns, read from message lists and checked."""

from __future__ import annotations

import re
from typing import Any

from keepset.data.fields import FLAGS, PLAIN, flag, trained
from keepset.data.reasons import RowProblem
from keepset.data.written import is_parts

Turn = tuple[str, str]

#: The role of an assistant's turn that is not trained on. It stands in tables and ids; messages say `train: False`.
CONTEXT = "assistant-context"
ANSWERS = ("assistant", CONTEXT)

MAX_MESSAGES = 10_000

#: Role names as they are found in the wild -> ours. `function_call` is the assistant's text in LLaMA-Factory's form.
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}

# Anthropic's HH-RLHF form: turns of one text, each led by a blank line and the speaker.
_HH_MARK = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")


def read_turns(value: Any, field: str) -> list[Turn]:
    """Read a list of `{role, content}` or `{from, value}` messages.

    Raises:
        RowProblem: null, not a list, empty, an unknown role, content that is missing, null or not text, or a key that
            `fields.FIELDS` refuses.
    """
    if type(value) is not list:
        if value is None:
            raise RowProblem("null-field", f"'{field}' is null")
        raise RowProblem("wrong-type", f"'{field}' is {type_name(value)}, not a list of messages")
    if not value:
        raise RowProblem("empty-messages", f"'{field}' is an empty list")
    if len(value) > MAX_MESSAGES:
        raise RowProblem("too-many-messages", f"'{field}' holds {len(value)} messages; at most {MAX_MESSAGES} are read")
    turns: list[Turn] = []
    for k, message in enumerate(value):
        if type(message) is not dict:
            raise RowProblem("wrong-type", f"'{field}[{k}]' is {type_name(message)}, not a message")
        role = message.get("role")
        if role is None:
            role = message.get("from")
        content = message.get("content")
        if content is None:
            content = message.get("value")
        kind = ROLES.get(role) if type(role) is str else None
        if kind is None:
            kind = _other_role(role, message, f"{field}[{k}]")
        if len(message) > 2:
            if None is not message.get("value") != content:
                raise RowProblem("unused-field", f"'{field}[{k}].value' is not the content, and would be lost")
            if not PLAIN.issuperset(message) and not trained(message, kind, f"{field}[{k}]"):
                kind = CONTEXT
        if type(content) is not str:
            content = _other_content(content, message, f"{field}[{k}]")
        elif content[:2] == "[{" and is_parts(content):
            raise RowProblem(
                "chat-as-text", f"the content of '{field}[{k}]' is text that holds a list of parts: write it as a list"
            )
        turns.append((kind, content))
    return turns


def _other_role(role: Any, message: dict[str, Any], place: str) -> str:
    if role is None:
        absent = "role" not in message and "from" not in message
        raise RowProblem("missing-column" if absent else "null-field", f"'{place}' has no role")
    if type(role) is not str:
        raise RowProblem("wrong-type", f"the role of '{place}' is {type_name(role)}, not text")
    kind = ROLES.get(role.strip().lower())
    if kind is None:
        raise RowProblem("unknown-role", f"'{place}' has the role '{role[:40]}'")
    return kind


def _other_content(content: Any, message: dict[str, Any], place: str) -> str:
    if content is None:
        absent = "content" not in message and "value" not in message
        raise RowProblem("missing-column" if absent else "null-field", f"'{place}' has no content")
    if type(content) is not list:
        raise RowProblem("wrong-type", f"the content of '{place}' is {type_name(content)}, not text")
    texts = []
    for part in content:
        if type(part) is dict and any(part.get(key) is not None and flag(part[key]) is not True for key in FLAGS):
            raise RowProblem(
                "unused-field", f"'{place}' marks a part as not trained on, and whole messages are followed"
            )
        if type(part) is str:
            texts.append(part)
        elif type(part) is dict and type(part.get("text")) is str and part.get("type", "text") == "text":
            texts.append(part["text"])
        else:
            kind = part.get("type") if type(part) is dict else type_name(part)
            raise RowProblem("non-text-content", f"'{place}' holds a part of type '{str(kind)[:40]}'")
    return "".join(texts)


def check_chat(turns: list[Turn], *, n_prompt: int = 0) -> list[Turn]:
    """Return the turns if they can be trained on.

    The first `n_prompt` turns are only context (a pair's prompt): empty answers among them are let through, since real
    preference data holds them and nothing of them is supervised.

    Raises:
        RowProblem: a system turn that is not first, the same speaker twice, an empty turn, no assistant at the end, no
            answer that is trained on.
    """
    before = ""
    answers = learnt = 0
    for k, (role, content) in enumerate(turns):
        if role in ANSWERS:
            answers += 1
            learnt += k >= n_prompt and role == "assistant"
            if before == "assistant":
                raise RowProblem("same-role-twice", f"messages {k} and {k + 1} are both the assistant's")
            if k >= n_prompt and role == "assistant" and (not content or content.isspace()):
                raise RowProblem("empty-completion", f"the assistant's message {k + 1} is empty")
        elif role == "user":
            if before == "user":
                raise RowProblem("same-role-twice", f"messages {k} and {k + 1} are both the user's")
            if not content or content.isspace():
                raise RowProblem("empty-prompt", f"the user's message {k + 1} is empty")
        elif role == "system" and k:
            raise RowProblem("system-not-first", f"message {k + 1} is a system message")
        before = "assistant" if role == CONTEXT else role
    if not answers:
        raise RowProblem("no-assistant-turn", "no message is the assistant's")
    if before != "assistant":
        raise RowProblem("last-turn-not-assistant", f"the last message is the {before}'s")
    if not learnt:
        raise RowProblem("not-trained", "every answer is marked as not trained on")
    return turns


def is_learnt(message: dict[str, Any]) -> bool:
    """Tell whether a message's content is trained on, as far as the row says (`model.supervise` may take less)."""
    return message["role"] in ("assistant", "text") and message.get("train", True) is not False


def looks_hh(text: str) -> bool:
    """Tell whether a text is an HH-RLHF dialogue: `\\n\\nHuman: … \\n\\nAssistant:` from its start."""
    return (
        "Human:" in text[:16]
        and text.lstrip().startswith("Human:")
        and ("\n\nAssistant:" in text or "\n\r\nAssistant:" in text)
    )


def split_hh(text: str, *, prompt: bool) -> list[Turn]:
    """Split an HH-RLHF dialogue into turns, white space around each removed; a prompt's last bare `Assistant:` goes."""
    parts = _HH_MARK.split(text)
    turns = [
        ("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if prompt and turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return turns


def type_name(value: Any) -> str:
    """Name a value's type as a user of JSON knows it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
