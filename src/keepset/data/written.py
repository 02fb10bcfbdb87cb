"""Chats that stand in a column as text: JSON, or the Python literal that a table library wrote for a list."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from keepset.data.jsontext import MAX_DEPTH, depth, parse_row, strings
from keepset.data.reasons import RowProblem

_MEDIA_PARTS = ("image", "image_url", "audio", "input_audio", "video")
MAX_LITERAL = 2**20
"""Python text beyond this many characters is not parsed: its syntax tree would take a hundred times as much."""

LISTS = ("messages", "conversations", "conversation", "history")
"""Columns whose text is never anything but a list."""

_START = re.compile(r"""["'\s]*(?:array\(|list\()?[\[({\s]*\{""")
_ROLE = re.compile(r"""\\?["'](?:role|from)\\?["']\s*:""")
_TEXT = re.compile(r"""\\?["'](?:content|value)\\?["']\s*:""")


def spoken(name: str, value: Any) -> Any:
    """Return a column's value with messages in the place of the text that they are written as.

    Any other text stays text: an answer may well be a list of numbers, or an object of its own.

    Raises:
        RowProblem: `chat-as-text`: roles and contents in brackets that can't be read as a chat; or what `parse_row`
            raises for a chat in JSON.
    """
    if type(value) is not str:
        return value
    if name in LISTS:
        content = _parsed(name, value.strip()) if value.lstrip()[:1] in ("[", "{", '"') else None
        return content if type(content) in (list, dict) else value
    if not (_START.match(value) and _ROLE.search(value) and _TEXT.search(value)):
        return value
    content = _parsed(name, value.strip())
    top = content if type(content) is list else [content]
    if any(_is_message(item) for item in top):
        return content
    if content is None or _holds_message(content):
        raise RowProblem("chat-as-text", f"'{name}' is text that holds a chat: write it as a list of messages")
    return value


def is_parts(text: str) -> bool:
    """Tell whether a text is a list of content parts (`[{"type": "text", "text": …}]`) that was written as JSON."""
    if '"type"' not in text:
        return False
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(
        type(part) is dict
        and ((part.get("type") == "text" and type(part.get("text")) is str) or part.get("type") in _MEDIA_PARTS)
        for part in parts
    )


def _is_message(value: Any) -> bool:
    return (
        type(value) is dict
        and type(value.get("role", value.get("from"))) is str
        and any(key in value and type(value[key]) in (str, list, type(None)) for key in ("content", "value"))
    )


def _holds_message(value: Any) -> bool:
    stack = [value]
    while stack:
        item = stack.pop()
        if _is_message(item):
            return True
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return False


def _parsed(name: str, text: str) -> Any:
    """Parse JSON (also JSON in a JSON string), else a Python literal; None if it is neither."""
    try:
        content = parse_row(f'{{"x":{text}}}')["x"]
        return _parsed(name, content.strip()) if type(content) is str and content.strip()[:1] in ("[", "{") else content
    except RowProblem as bad:
        if bad.reason not in ("bad-json", "control-character"):
            raise RowProblem(bad.reason, f"'{name}': {bad.detail}") from None
    if len(text) > MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, of escapes in the text
            content = ast.literal_eval(text)
        if type(content) is str or depth(content) > MAX_DEPTH:
            return None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    for s in strings(content):
        if type(s) is str and "\0" in s:
            raise RowProblem("nul-character", f"'{name}': a string holds NUL")
        if type(s) is str and not s.isascii() and any("\ud800" <= c <= "\udfff" for c in s):
            raise RowProblem("lone-surrogate", f"'{name}': a string holds half of a surrogate pair")
    return content
