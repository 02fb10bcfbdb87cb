"""Properties of reading and writing, searched with hypothesis."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_rows import ALL, PAIRS, good
from keepset.data import REASONS, load_pool, load_target, write_subset
from keepset.data.columns import canonical, content_digest, unique_ids
from keepset.data.jsontext import depth, parse_row, strings
from keepset.data.reasons import RowProblem, excerpt
from keepset.data.turns import check_chat, read_turns, split_hh
from keepset.errors import DataError
from keepset.recipe import DataSpec

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

# any text a row may hold: no lone surrogate, no NUL, not blank
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda s: bool(s.strip())
)
plain_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


pools = st.lists(st.fixed_dictionaries({"messages": chats()}, optional={"meta": plain_json}), min_size=1, max_size=6)


def load_rows(rows: list[dict[str, Any]], folder: str, name: str = "x.jsonl") -> Any:
    path = Path(folder) / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return load_pool(path)


@quick
@given(pools, st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.zst", ".csv"]))
def test_container_round_trip(rows: list[dict[str, Any]], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = load_rows(rows, folder)
        assert [list(m) for m in pool.all_messages()] == [row["messages"] for row in rows]
        out = Path(folder) / f"out{suffix}"
        write_subset(pool, range(len(pool)), out)
        again = load_pool(out)
        assert again.ids.tolist() == pool.ids.tolist() and not again.quarantine
        if suffix != ".csv":
            assert [json.loads(t) for t in again.table["raw"].to_pylist()] == rows


@quick
@given(st.lists(chats(), min_size=1, max_size=5))
def test_parquet_round_trip(rows: list[list[dict[str, str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = load_rows([{"messages": chat} for chat in rows], folder)
        write_subset(pool, range(len(pool)), Path(folder) / "out.parquet")
        assert list(load_pool(Path(folder) / "out.parquet").all_messages()) == rows


@quick
@given(pools, st.sampled_from(["messages", "alpaca", "sharegpt", "prompt-completion"]))
def test_dialect_round_trip(rows: list[dict[str, Any]], to: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = load_rows(rows, folder)
        write_subset(pool, range(len(pool)), Path(folder) / "out.jsonl", to=to)
        again = load_pool(Path(folder) / "out.jsonl")
        assert again.dialect == to and again.ids.tolist() == pool.ids.tolist()


@quick
@given(chats())
def test_normalising_twice_is_normalising_once(chat: list[dict[str, str]]) -> None:
    once = check_chat(read_turns(chat, "messages"))
    twice = check_chat(read_turns([{"from": role, "value": content} for role, content in once], "messages"))
    assert once == twice and canonical(once) == canonical(twice)


@quick
@given(pools, st.randoms(use_true_random=False), st.integers(0, 6))
def test_ids_follow_rows_through_any_order_and_split(rows: list[dict[str, Any]], shuffle: Any, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = load_rows(rows, folder)
        order = list(range(len(rows)))
        shuffle.shuffle(order)
        mixed = [rows[k] for k in order]
        parts = []
        for name, part in (("a.jsonl", mixed[:cut]), ("b.jsonl", mixed[cut:])):
            if part:
                load_rows(part, folder, name)
                parts.append(Path(folder) / name)
        again = load_pool(parts)
        assert sorted(again.ids) == sorted(pool.ids)
        assert again.fingerprint() == pool.fingerprint() and again.duplicates == pool.duplicates
        bare = {i.split("-")[0]: canonical_of(again, k) for k, i in enumerate(again.ids)}
        assert all(bare[i.split("-")[0]] == canonical_of(pool, k) for k, i in enumerate(pool.ids))


def canonical_of(pool: Any, k: int) -> str:
    return canonical([(m["role"], m["content"]) for m in pool.messages(k)])


@quick
@given(chats())
def test_canonical_form_is_compact_json(chat: list[dict[str, str]]) -> None:
    pairs = [(m["role"], m["content"]) for m in chat]
    assert canonical(pairs) == json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))


@quick
@given(st.lists(st.sampled_from([bytes([k]) * 16 for k in (0, 1, 255)]), max_size=12))
def test_ids_are_unique_and_count_their_copies(digests: list[bytes]) -> None:
    ids, duplicates = unique_ids(b"".join(digests))
    found = ids.to_pylist()
    assert len(set(found)) == len(digests) and duplicates == len(digests) - len(set(digests))
    for k, digest in enumerate(digests):
        before = digests[:k].count(digest)
        assert found[k] == digest.hex() + (f"-{before}" if before else "")


@quick
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 30)), min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
def test_shots_are_nested_whatever_the_order(picks: list[tuple[str, int]], n: int, seed: int, shuffle: Any) -> None:
    rows = [{"task": t, "prompt": f"{t}{k}", "chosen": "a", "rejected": "b"} for t, k in dict.fromkeys(picks)]
    mixed = rows.copy()
    shuffle.shuffle(mixed)
    with tempfile.TemporaryDirectory() as folder:

        def shots(source: list[dict[str, Any]], n: int) -> dict[str, list[str]]:
            path = Path(folder) / "t.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in source))
            target = load_target(DataSpec.model_validate({"path": str(path), "shots": n}), seed=seed)
            assert target.n_in == len(source)
            return {t: target.ids[target.tasks == t].tolist() for t in "xyz"}

        few, more, other = shots(rows, n), shots(rows, n + 1), shots(mixed, n)
        for task in "xyz":
            assert more[task][:n] == few[task] == other[task]
            assert len(few[task]) == min(n, sum(r["task"] == task for r in rows))


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Flip, drop, double or insert bytes anywhere."""
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(broken) - 1, 0)))
        how = data.draw(st.sampled_from(["set", "drop", "insert", "cut"]))
        value = data.draw(st.sampled_from(list(b'"\\{}[],:\n\r\0\xff\x80 u0') + [0xED, 0xEF]))
        if how == "set" and broken:
            broken[at] = value
        elif how == "drop":
            del broken[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            broken.insert(at, value)
        elif data.draw(st.integers(0, 9)) == 0:
            del broken[at:]
    return bytes(broken)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(ALL), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_random_damage_loses_no_row_and_raises_nothing_else(data: st.DataObject, dialect: str, suffix: str) -> None:
    """JSON Lines: rows in = lines that are not blank. Any container: nothing but a DataError, and only known codes."""
    rows = [good(dialect, k) for k in range(5)]
    load = load_target if dialect in PAIRS else load_pool
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        load_rows(rows, folder, "sound.jsonl")
        write_subset(load_pool(Path(folder) / "sound.jsonl"), range(5), path)
        content = damaged(data, path.read_bytes())
        path.write_bytes(content)
        try:
            found = load(path, allow_empty=True)
        except DataError as refused:
            assert "\n" not in str(refused)
            return
        assert found.n_in == len(found) + len(found.quarantine)
        assert all(
            q.reason in REASONS and q.line >= 1 and len(q.excerpt) <= 200 and q.detail.isprintable()
            for q in found.quarantine
        )
        start = content.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        first, _, second = start.partition(b"\n")
        # a line break that fell in behind `{` or `,` makes an object spread over lines, which is one row
        spread = first.strip().endswith((b"{", b",")) and second.lstrip().startswith(b'"')
        if suffix == ".jsonl" and not start.startswith(b"[") and not spread:
            lines = [
                k
                for k, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
                if line.strip(b" \t\r\n")
            ]
            places = found.table["line"].to_pylist() + [q.line for q in found.quarantine]
            assert sorted(places) == lines


@quick
@given(st.lists(st.sampled_from(["good", "broken", "null", "blank", "role"]), min_size=1, max_size=12))
def test_bad_rows_do_not_touch_their_neighbours(kinds: list[str]) -> None:
    bad = {
        "broken": b'{"messages": [',
        "null": b'{"messages": null}',
        "role": b'{"messages": [{"role": "x", "content": "y"}]}',
    }
    lines = []
    for k, kind in enumerate(kinds):
        blank = good("messages", k)
        blank["messages"][-1]["content"] = " "
        row = {"good": good("messages", k), "blank": blank}.get(kind)
        lines.append(json.dumps(row).encode() if row else bad[kind])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(b"\n".join([json.dumps(good("messages", 99)).encode(), *lines]) + b"\n")
        pool = load_pool(path)
        sound = load_rows(
            [good("messages", 99)] + [good("messages", k) for k, x in enumerate(kinds) if x == "good"], folder
        )
        assert pool.ids.tolist() == sound.ids.tolist()
        assert len(pool.quarantine) == sum(x != "good" for x in kinds)


@quick
@given(st.dictionaries(texts, plain_json, max_size=4))
def test_the_parser_agrees_with_json_on_sound_rows(row: dict[str, Any]) -> None:
    assert parse_row(json.dumps(row)) == parse_row(json.dumps(row, ensure_ascii=False)) == row
    assert depth(row) >= 1 and set(row) <= set(strings(row))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text('{}[]",:\\u0189adDe+-.NIntfrl ', max_size=40))
def test_the_parser_raises_row_problems_only(text: str) -> None:
    try:
        assert isinstance(parse_row(text), dict)
    except RowProblem as bad:
        assert bad.reason in REASONS and bad.detail.isprintable()


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_dialogues_split_into_the_turns_they_were_made_of(turns: list[tuple[str, str]]) -> None:
    clean = [(q.strip().replace("\n", " "), a.strip().replace("\n", " ")) for q, a in turns]
    text = "".join(f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in clean)
    want = [turn for q, a in clean for turn in (("user", q.strip()), ("assistant", a.strip()))]
    assert split_hh(text, prompt=False) == want
    assert split_hh(text + "\n\nHuman: last\n\nAssistant:", prompt=True) == [*want, ("user", "last")]


@quick
@given(st.binary(max_size=2000) | st.text(max_size=400))
def test_excerpts_are_short_and_printable(data: bytes | str) -> None:
    shown = excerpt(data)
    assert len(shown) <= 200 and (shown.isprintable() or not shown)


@quick
@given(st.lists(chats(), min_size=2, max_size=6), st.data())
def test_take_is_indexing(rows: list[list[dict[str, str]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = load_rows([{"messages": chat} for chat in rows], folder)
        picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
        part = pool.take(np.array(picks, dtype=int))
        assert part.ids.tolist() == [pool.ids[k] for k in picks]
        assert list(part.all_messages()) == [rows[k] for k in picks]
        assert content_digest([(m["role"], m["content"]) for m in rows[0]]).hex() == pool.ids[0]
