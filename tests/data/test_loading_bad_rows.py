"""Bad rows: every kind in every dialect where it makes sense, with the exact code and line, and nothing else lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_rows import ALL, ANSWER, PAIRS, PROMPT, good, lines, write_lines, write_rows
from keepset.data import REASONS, FileRefused, load_pool, load_target
from keepset.data.streams import MAX_ROW

AT = 2  # the damaged row of five: line 3


def tail(line: bytes, extra: bytes) -> bytes:
    """Add a column to a row's JSON text."""
    return line[:-1] + b", " + extra + b"}"


# Damage to the text of a row: it does not matter which dialect the row has.
TEXT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "garbage": (lambda line: b"<<<<<<< HEAD", "bad-json"),
    "half a row": (lambda line: line[: len(line) // 2], "bad-json"),
    "two rows on a line": (lambda line: line + line, "bad-json"),
    "comma at the end": (lambda line: line + b",", "bad-json"),
    "single quotes": (lambda line: b"{'a': 'b'}", "bad-json"),
    "invalid UTF-8": (lambda line: line.replace(b"tag", b"t\xffg"), "invalid-utf8"),
    "UTF-8 of a surrogate": (lambda line: tail(line, b'"x": "\xed\xa0\xbd"'), "invalid-utf8"),
    "raw control character": (lambda line: tail(line, b'"x": "a\x01b"'), "control-character"),
    "raw tab in a string": (lambda line: tail(line, b'"x": "a\tb"'), "control-character"),
    "raw NUL": (lambda line: tail(line, b'"x": "a\x00b"'), "nul-character"),
    "escaped NUL": (lambda line: tail(line, rb'"x": "a\u0000b"'), "nul-character"),
    "lone surrogate": (lambda line: tail(line, rb'"x": "\ud83d"'), "lone-surrogate"),
    "lone low surrogate in a key": (lambda line: tail(line, rb'"\uDE00": 1'), "lone-surrogate"),
    "NaN": (lambda line: tail(line, b'"x": NaN'), "nan-number"),
    "Infinity": (lambda line: tail(line, b'"x": -Infinity'), "nan-number"),
    "float overflow": (lambda line: tail(line, b'"x": 1e999'), "nan-number"),
    "huge integer": (lambda line: tail(line, b'"x": 9223372036854775808'), "huge-integer"),
    "integer of 5,000 digits": (lambda line: tail(line, b'"x": ' + b"9" * 5000), "huge-integer"),
    "duplicate key": (lambda line: tail(line, b'"tag": 7'), "duplicate-key"),
    "duplicate key inside": (lambda line: tail(line, b'"x": {"a": 1, "a": 1}'), "duplicate-key"),
    "nested 70 deep": (lambda line: tail(line, b'"x": ' + b"[" * 70 + b"]" * 70), "too-deep"),
    "nested 20,000 deep": (lambda line: tail(line, b'"x": ' + b"[" * 20_000 + b"]" * 20_000), "too-deep"),
    "an array": (lambda line: b'["a", "b"]', "not-an-object"),
    "a string": (lambda line: b'"text"', "not-an-object"),
    "null": (lambda line: b"null", "not-an-object"),
    "an empty object": (lambda line: b"{}", "missing-column"),
}


def load(path: Path, dialect: str, **options: Any) -> Any:
    return (load_target if dialect in PAIRS else load_pool)(path, allow_empty=True, **options)


def check(path: Path, dialect: str, reason: str, line: int = AT + 1, n: int = 5) -> None:
    """One row is quarantined with this code at this line; the others are read as if it were not there."""
    found = load(path, dialect)
    assert [(q.reason, q.line, q.file) for q in found.quarantine] == [(reason, line, str(path))]
    assert reason in REASONS and found.quarantine[0].detail and len(found.quarantine[0].excerpt) <= 200
    assert found.n_in == len(found) + len(found.quarantine) == n
    assert found.table["line"].to_pylist() == [k for k in range(1, n + 1) if k != line]
    with pytest.raises(FileRefused, match=rf":{line}: .*\[{reason}\]$") as stop:
        load(path, dialect, strict=True)
    assert (stop.value.line, stop.value.reason, stop.value.exit_code) == (line, reason, 4)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("dialect", ["messages", "sharegpt", "alpaca", "prompt-completion", "preference", "text"])
@pytest.mark.parametrize("kind", TEXT)
def test_damaged_text(tmp_path: Path, kind: str, dialect: str) -> None:
    damage, reason = TEXT[kind]
    rows = lines(dialect)
    rows[AT] = damage(rows[AT])
    check(write_lines(tmp_path / "x.jsonl", rows), dialect, reason)


def test_numbers_that_are_refused_are_named_by_their_column(tmp_path: Path) -> None:
    told = {
        '"x": 1, "score": NaN': "the number NaN in 'score'",
        '"meta": {"a": [0, {"b": -Infinity}]}': "the number -Infinity in 'meta'",
        '"x": 1e999': "the number 1e999 overflows in 'x'",
        '"id": 9223372036854775808, "y": 2': "the integer 9223372036854775808 in 'id'",
    }
    rows = [f'{{"prompt": "q", "completion": "a", {tail}}}' for tail in told]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    assert [q.detail for q in load_pool(tmp_path / "x.jsonl", allow_empty=True).quarantine] == list(told.values())


def test_two_rows_on_the_last_line_are_not_a_row_cut_short(tmp_path: Path) -> None:
    row = json.dumps(good("alpaca", 1))
    (tmp_path / "x.jsonl").write_text(row + "\n" + row + row)
    (bad,) = load_pool(tmp_path / "x.jsonl").quarantine
    assert (bad.reason, bad.line) == ("bad-json", 2) and "something follows the JSON value" in bad.detail


@pytest.mark.parametrize("dialect", ALL)
def test_truncated_last_line(tmp_path: Path, dialect: str) -> None:
    rows = lines(dialect)
    rows[4] = rows[4][:-9]
    check(write_lines(tmp_path / "x.jsonl", rows, end=b""), dialect, "truncated-line", line=5)


def _set(column: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        row[column] = value

    return change


def _field_cases() -> list[tuple[str, str, Callable[[dict[str, Any]], None], str]]:
    cases = []
    for dialect in ALL:
        answer, prompt = ANSWER[dialect], PROMPT.get(dialect)
        for column in dict.fromkeys([answer, prompt]):
            if column is not None:
                cases.append((dialect, f"null {column}", _set(column, None), "null-field"))
                cases.append((dialect, f"number {column}", _set(column, 7), "wrong-type"))
                cases.append((dialect, f"boolean {column}", _set(column, True), "wrong-type"))
        if dialect != "preference-implicit":

            def drop(row: dict[str, Any], column: str = answer) -> None:
                del row[column]

            cases.append((dialect, f"no {answer}", drop, "missing-column"))
        if type(good(dialect, 0)[answer]) is str:
            blank = "\n\nHuman: q\n\nAssistant: " if dialect == "hh-rlhf" else " \n\t"
            code = "different-prompts" if dialect == "hh-rlhf" else "empty-completion"
            cases.append((dialect, f"blank {answer}", _set(answer, blank), code))
            cases.append((dialect, f"empty {answer}", _set(answer, ""), "empty-completion"))
        if prompt and type(good(dialect, 0)[prompt]) is str and dialect != "alpaca":
            cases.append((dialect, f"empty {prompt}", _set(prompt, ""), "empty-prompt"))
            cases.append((dialect, f"blank {prompt}", _set(prompt, " \u00a0"), "empty-prompt"))
    return cases


FIELDS = _field_cases()


@pytest.mark.parametrize(("dialect", "kind", "change", "reason"), FIELDS, ids=[f"{d}-{k}" for d, k, _, _ in FIELDS])
def test_damaged_fields(tmp_path: Path, dialect: str, kind: str, change: Any, reason: str) -> None:
    rows = [good(dialect, k) for k in range(5)]
    change(rows[AT])
    check(write_rows(tmp_path / "x.jsonl", rows), dialect, reason)


def U(text: Any = "q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text} | more


def A(text: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


S = {"role": "system", "content": "s"}
CHATS: dict[str, tuple[Any, str]] = {
    "unknown role": ([U(), {"role": "wizard", "content": "a"}], "unknown-role"),
    "the internal role": ([{"role": "text", "content": "a"}], "unknown-role"),
    "no role": ([U(), {"content": "a"}], "missing-column"),
    "null role": ([U(), {"role": None, "content": "a"}], "null-field"),
    "role a number": ([U(), {"role": 3, "content": "a"}], "wrong-type"),
    "no content": ([U(), {"role": "assistant"}], "missing-column"),
    "null content": ([U(), A(None)], "null-field"),
    "content a number": ([U(), A(4)], "wrong-type"),
    "content an object": ([U(), A({"text": "a"})], "wrong-type"),
    "no assistant": ([S, U()], "no-assistant-turn"),
    "system alone": ([S], "no-assistant-turn"),
    "ends on user": ([U(), A(), U("more")], "last-turn-not-assistant"),
    "ends on tool": ([U(), A(), {"role": "tool", "content": "42"}], "last-turn-not-assistant"),
    "two users": ([U(), U("again"), A()], "same-role-twice"),
    "two assistants": ([U(), A(), A("b")], "same-role-twice"),
    "system in the middle": ([U(), S, A()], "system-not-first"),
    "system twice": ([S, S, U(), A()], "system-not-first"),
    "tool calls": ([U(), A(None, tool_calls=[{"id": "1"}]), A()], "tool-calls"),
    "tool calls with content": ([U(), A("calling", tool_calls=[{"id": "1"}])], "tool-calls"),
    "function call object": ([U(), A(None, function_call={"name": "f"})], "tool-calls"),
    "an image": ([U([{"type": "text", "text": "see"}, {"type": "image", "image": "x.png"}]), A()], "non-text-content"),
    "a sound": ([U([{"type": "input_audio", "input_audio": {}}]), A()], "non-text-content"),
    "an image URL": ([U([{"type": "image_url", "image_url": {"url": "x"}}]), A()], "non-text-content"),
    "empty list": ([], "empty-messages"),
    "a text": ("Human: q", "wrong-type"),
    "an object": ({"role": "user"}, "wrong-type"),
    "a message that is text": ([U(), "a"], "wrong-type"),
    "a message that is null": ([U(), None], "wrong-type"),
    "empty answer": ([U(), A("")], "empty-completion"),
    "blank answer": ([U(), A(" \n ")], "empty-completion"),
    "empty first answer": ([U(), A(""), U(), A()], "empty-completion"),
    "empty question": ([U(""), A()], "empty-prompt"),
    "20,002 messages": ([U(), A()] * 10_001, "too-many-messages"),
}


def _sharegpt(value: Any) -> Any:
    names = {"role": "from", "content": "value"}
    if type(value) is not list:
        return value
    return [{names.get(k, k): v for k, v in m.items()} if type(m) is dict else m for m in value]


@pytest.mark.parametrize("dialect", ["messages", "sharegpt"])
@pytest.mark.parametrize("kind", CHATS)
def test_damaged_chats(tmp_path: Path, kind: str, dialect: str) -> None:
    chat, reason = CHATS[kind]
    rows = [good(dialect, k) for k in range(5)]
    rows[AT][ANSWER[dialect]] = _sharegpt(chat) if dialect == "sharegpt" else chat
    check(write_rows(tmp_path / "x.jsonl", rows), dialect, reason)


@pytest.mark.parametrize("dialect", ["messages", "sharegpt", "llamafactory-preference"])
def test_tool_definitions(tmp_path: Path, dialect: str) -> None:
    rows = [good(dialect, k) for k in range(5)]
    for row in rows:
        row["tools"] = []
    rows[AT]["tools"] = '[{"name": "search"}]'
    check(write_rows(tmp_path / "x.jsonl", rows), dialect, "tool-calls")


PAIR_CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "same sides": ("preference", {"chosen": "It is.", "rejected": "It is."}, "identical-pair"),
    "same sides but for space": ("preference", {"chosen": "It is.", "rejected": " It is.\n"}, "identical-pair"),
    "same chats": ("preference-chat", {"chosen": [A("x")], "rejected": [A("x")]}, "identical-pair"),
    "same dialogues": (
        "hh-rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a"},
        "identical-pair",
    ),
    "empty last turn": (
        "hh-rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: a"},
        "empty-completion",
    ),
    "same whole chats": ("preference-implicit", {"chosen": [U(), A()], "rejected": [U(), A()]}, "identical-pair"),
    "same messages": (
        "llamafactory-preference",
        {"chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "x"}},
        "identical-pair",
    ),
    "SHP same": ("shp", {"human_ref_A": "x", "human_ref_B": "x"}, "identical-pair"),
    "empty rejected": ("preference", {"rejected": " "}, "empty-completion"),
    "empty rejected chat": ("preference-chat", {"rejected": [A("")]}, "empty-completion"),
    "no messages rejected": ("preference-chat", {"rejected": []}, "empty-messages"),
    "null rejected": ("preference", {"rejected": None}, "null-field"),
    "SHP B empty": ("shp", {"human_ref_B": ""}, "empty-completion"),
    "other questions": (
        "preference-implicit",
        {"chosen": [U("one"), A("a")], "rejected": [U("two"), A("b")]},
        "different-prompts",
    ),
    "other dialogues": (
        "hh-rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: a"},
        "different-prompts",
    ),
    "later questions differ": (
        "preference-implicit",
        {"chosen": [U(), A(), U("x"), A("1")], "rejected": [U(), A(), U("y"), A("2")]},
        "different-prompts",
    ),
    "texts without a shared start": ("preference-implicit", {"chosen": "Yes", "rejected": "No"}, "different-prompts"),
    "score tie": ("shp", {"score_A": 4, "score_B": 4}, "score-tie"),
    "label against scores": ("shp", {"labels": 0}, "label-against-scores"),
    "label of neither": ("shp", {"labels": 2}, "wrong-type"),
    "label null": ("shp", {"labels": None}, "null-field"),
    "rated tie": ("preference", {"score_chosen": 7.0, "score_rejected": 7.0}, "score-tie"),
    "rated the other way": ("preference", {"score_chosen": 1, "score_rejected": 8}, "label-against-scores"),
    "rated the other way, Argilla": (
        "preference",
        {"chosen-rating": 1.0, "rejected-rating": 4.5},
        "label-against-scores",
    ),
    "rated alike": ("preference", {"chosen_rating": 3, "rejected_rating": 3}, "score-tie"),
    "voted the other way": ("stack-exchange", {"chosen_score": 1, "rejected_score": 8}, "label-against-scores"),
    "chosen by the user": ("preference-chat", {"chosen": [A("a"), U("q")]}, "last-turn-not-assistant"),
    "chosen without Human:": ("hh-rlhf", {"chosen": "just an answer"}, "wrong-type"),
    "unknown role in chosen": ("preference-chat", {"chosen": [{"role": "x", "content": "y"}]}, "unknown-role"),
    "prompt ends on the assistant": ("preference-chat", {"prompt": [U(), A()]}, "same-role-twice"),
}


@pytest.mark.parametrize("kind", PAIR_CASES)
def test_damaged_pairs(tmp_path: Path, kind: str) -> None:
    dialect, change, reason = PAIR_CASES[kind]
    rows = [good(dialect, k) for k in range(5)]
    rows[AT] |= change
    check(write_rows(tmp_path / "x.jsonl", rows), dialect, reason)


def test_a_line_beyond_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ROW == 64 * 2**20
    monkeypatch.setattr("keepset.data.jsonfiles.MAX_ROW", 5000)
    rows = lines("alpaca")
    rows[AT] = tail(rows[AT], b'"x": "' + b"y" * 3_000_000 + b'"')
    check(write_lines(tmp_path / "x.jsonl", rows), "alpaca", "line-too-long")


def test_every_row_bad_is_an_error_that_tells_the_first_place(tmp_path: Path) -> None:
    rows = [good("alpaca", k) | {"output": ""} for k in range(3)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(FileRefused, match=r"none of the 3 rows.*empty-completion \(3\).*x\.jsonl:1") as stop:
        load_pool(path)
    assert len(stop.value.quarantine) == 3 and stop.value.reason == "no-usable-row"


def test_what_looks_odd_but_is_sound_is_kept(tmp_path: Path) -> None:
    """User ids repeat, are missing or change type; null input; unused nulls; emoji as escaped pairs; long integers."""
    rows = [good("alpaca", k) for k in range(8)]
    rows[0]["id"], rows[1]["id"], rows[2]["id"] = 1, "1", 1
    rows[3]["input"] = None
    rows[4]["instruction"] = ""
    rows[5]["meta"] = None
    rows[6]["n"] = 2**63 - 1
    path = tmp_path / "x.jsonl"
    texts = [json.dumps(row, ensure_ascii=True).encode() for row in rows]
    texts[7] = tail(texts[7], rb'"x": "\ud83d\ude00 \\u0000 \u2028"')
    pool = load_pool(write_lines(path, texts))
    assert len(pool) == 8 and not pool.quarantine and pool.duplicates == 0
    assert pool.messages(4)[0]["content"] == "Case 4"
    assert pool.table["raw"].to_pylist() == [t.decode() for t in texts]


def test_every_code_of_the_table_is_explained_and_every_code_used_is_in_it() -> None:
    import re

    import keepset.data

    folder = Path(keepset.data.__file__).parent
    used = set()
    for source in folder.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:RowProblem|refuse)\(\s*"([a-z0-9-]+)"', text))
        used |= set(re.findall(r'FileRefused\(\s*[^,"]+(?:\([^)]*\))?, "([a-z0-9-]+)"', text))
        used |= set(re.findall(r'Quarantined\(\s*[^"]*?, "([a-z0-9-]+)"', text))
    assert used <= set(REASONS)
    assert len(used) > 35
    assert all(re.fullmatch(r"[a-z0-9-]+", code) and told[-1] != "." for code, told in REASONS.items())
