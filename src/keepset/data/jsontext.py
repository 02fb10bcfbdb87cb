"""One JSON text to one row, more strictly than `json.loads`: what other readers change or lose silently is named."""

from __future__ import annotations

import json
import re
from typing import Any

from keepset.data.reasons import RowProblem

MAX_DEPTH = 64
_SURROGATE = re.compile(r"\\u[dD][89abcdefABCDEF]")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise RowProblem("duplicate-key", f"key '{twice[:60]}' stands twice")
    return row


def _constant(word: str) -> Any:
    raise RowProblem("nan-number", f"the number {word}")


def _int(digits: str) -> int:
    if len(digits) > 18:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise RowProblem("huge-integer", f"the integer {digits[:40]}")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if number - number != 0:
        raise RowProblem("nan-number", f"the number {digits[:40]} overflows")
    return number


_scan = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_int, parse_float=_float
).scan_once  # type: ignore[attr-defined]


def parse_row(text: str) -> dict[str, Any]:
    """Parse one row's JSON (no white space around it).

    Raises:
        RowProblem: the text is not one JSON object, or holds what other readers would change silently: a key twice,
            NaN, an integer beyond 64 bits, a lone surrogate, NUL, nesting beyond 64 levels.
    """
    try:
        row, end = _scan(text, 0)
    except StopIteration as stop:
        raise RowProblem("bad-json", f"no JSON value at character {int(stop.value) + 1}") from None
    except RowProblem as bad:
        raise RowProblem(bad.reason, bad.detail + _place(text)) from None
    except json.JSONDecodeError as error:
        if error.msg.startswith("Invalid control character"):
            if text[error.pos : error.pos + 1] == "\0":
                raise RowProblem("nul-character", f"NUL at character {error.pos + 1}") from None
            raise RowProblem("control-character", f"raw control character at character {error.pos + 1}") from None
        raise RowProblem("bad-json", f"{error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise RowProblem("too-deep", f"nested more than {MAX_DEPTH} levels") from None
    if end != len(text):
        if text[end:].lstrip().startswith("\ufeff"):
            cause = "a byte-order mark: two files were put together without a line break"
            raise RowProblem("bad-json", f"after the JSON value, at character {end + 1}, stands {cause}")
        rest = text[end:].lstrip()[:20]
        raise RowProblem("bad-json", f"something follows the JSON value at character {end + 1}: {rest}")
    if type(row) is not dict:
        raise RowProblem("not-an-object", f"a JSON {_kind(row)}, not an object")
    if text.count("[") + text.count("{") > MAX_DEPTH and depth(row) > MAX_DEPTH:
        raise RowProblem("too-deep", f"nested more than {MAX_DEPTH} levels")
    if "\\u" in text:
        check_escapes(text, row)
    return row


def _place(text: str) -> str:
    """Name the column of the number that was refused, if the rest of the text is sound."""
    path: list[str] = []

    def tried(read: Any) -> Any:
        def number(digits: str) -> Any:
            try:
                return read(digits)
            except RowProblem:
                return path

        return number

    try:
        row = json.loads(text, parse_constant=tried(_constant), parse_int=tried(_int), parse_float=tried(_float))
    except (ValueError, RecursionError):
        return ""
    stack = [(name, value) for name, value in row.items()] if type(row) is dict else []
    while stack:
        name, value = stack.pop()
        if value is path:
            return f" in '{name[:60]}'"
        inner = value.values() if type(value) is dict else value if type(value) is list else ()
        stack += [(name, part) for part in inner]
    return ""


def check_escapes(text: str, row: Any) -> None:
    """Refuse NUL and lone surrogates, looking at the values only where the text gives cause to."""
    if "\\u0000" in text and any("\0" in s for s in strings(row)):
        raise RowProblem("nul-character", "a string holds \\u0000")
    if _SURROGATE.search(text):
        for s in strings(row):
            try:
                s.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowProblem("lone-surrogate", f"a string holds \\u{ord(s[error.start]):04x} alone") from None


def strings(value: Any) -> list[str]:
    """Return every string in a JSON value, keys included, without recursion."""
    texts: list[str] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            texts.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return texts


def depth(value: Any) -> int:
    """Return how deep a JSON value is nested (a scalar: 0), without recursion."""
    level, current = 0, [value]
    while current := [v for v in current if isinstance(v, (dict, list))]:
        level += 1
        current = [child for v in current for child in (v.values() if isinstance(v, dict) else v)]
    return level


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
