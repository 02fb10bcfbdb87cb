"""`keepset inspect`: what a data file holds and what is wrong with it, before anything is spent on it.

Torch-free. With a model named, its tokenizer adds token lengths, the rows that its template refuses, and three rows as
the model will see them, supervised tokens marked.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepset.data import REASONS, Message, Pool, Quarantined, Target, find_leaks, load_pool, load_target
from keepset.data.dialects import PAIRS
from keepset.data.fields import COLUMNS, NOTES, carried, carried_keys
from keepset.data.target import LENGTH_MATCH
from keepset.data.turns import is_learnt
from keepset.data.words import count_words
from keepset.data.written import spoken
from keepset.recipe import DataSpec, ModelSpec
from keepset.selection.dedup import near_copies, near_pairs

if TYPE_CHECKING:
    from keepset.model.encode import Encoder

LEAK_WORDS = 8
NEAR = 0.8  # Jaccard of word 5-grams from which on two rows count as near copies
EXAMPLE_CHARACTERS = 900
TEMPLATE_REASONS = {
    "over-long": "the row is longer than max_length",
    "no-supervised-token": "no token of the row would be supervised",
    "template-refused": "the chat template raised an error, or its text could not be followed",
    "special-token-in-text": "a message holds one of the model's control tokens",
    "token-beyond-embedding": "the row holds a token that the model's embedding has no row for",
}


def inspect_data(
    data: DataSpec | str | Path,
    *,
    target: Sequence[DataSpec | str | Path] = (),
    evaluation: Sequence[DataSpec | str | Path] = (),
    model: ModelSpec | None = None,
) -> dict[str, Any]:
    """Look at one data file, folder or hub dataset.

    Of a `DataSpec` format, limit and columns are honoured. Rows of `target` and `evaluation` must not be in the data.
    `model` adds token lengths and rendered rows by its tokenizer and template.

    Returns:
        JSON-ready facts: `format`, `container`, `columns`, `carried` (columns and message keys that are not used),
        `rows_in` = `rows` + `quarantined`, `duplicates`, `near_duplicates`, `reasons`, `drops` (lines: the thinking
        that the model's template drops), `roles`, `sources`, `lengths` (unit, quantiles, histogram), `pairs`,
        `examples`, `leakage`, `advice`.

    Raises:
        DataError: a file that is refused as a whole.
        ModelError: the named model's tokenizer can't be loaded.
    """
    spec = data if isinstance(data, DataSpec) else DataSpec.model_validate({"path": str(data)})
    pool = load_pool(spec, allow_empty=True)
    messages = list(pool.all_messages())
    texts = [answer_text(row) for row in messages]
    encoder, encoded, refused, drops = encode(model, messages) if model is not None else (None, None, [], [])
    counts = count_words(texts).tolist() if encoded is None else [n for n in encoded if n]
    facts: dict[str, Any] = {
        "path": spec.path,
        "format": pool.dialect if len(pool) else "unknown",
        "container": sorted({info.container for info in pool.files}),
        "columns": sorted({column for info in pool.files for column in info.columns}),
        "carried": carried_along(pool),
        "rows_in": pool.n_in,
        "rows": len(pool),
        "quarantined": len(pool.quarantine),
        "duplicates": pool.duplicates,
        "near_duplicates": near_copies([whole_text(row) for row in messages], NEAR),
        "reasons": reasons(pool.quarantine, refused, pool),
        "drops": drops,
        "roles": dict(Counter(" ".join(m["role"] for m in row[:6]) for row in messages).most_common(6)),
        "sources": dict(Counter(str(s) for s in pool.sources()).most_common(12)),
        "categories": dict(Counter(str(c) for c in pool.categories() if c is not None).most_common(12)),
        "lengths": lengths(counts, "words" if encoded is None else "supervised tokens"),
        "pairs": pair_facts(load_target(spec, allow_empty=True)) if pool.dialect in PAIRS else None,
        "examples": examples(pool, messages, texts, encoder),
        "leakage": [
            leakage(pool, messages, load_target(other), name)
            for name, others in (("target", target), ("evaluation", evaluation))
            for other in others
        ],
    }
    facts["advice"] = advice(facts)
    return facts


def carried_along(pool: Pool) -> dict[str, dict[str, int]]:
    """The usable rows' `columns` and `message_keys` that are not used, and in how many rows they are not null."""
    dialects = {info.file: info.dialect for info in pool.files}
    columns: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for raw, file in zip(pool.table["raw"].to_pylist(), pool.table["file"].to_pylist(), strict=True):
        row, dialect = json.loads(raw), dialects[file]
        columns.update(carried(row, dialect))
        chats = (spoken(name, row.get(name)) for group in COLUMNS[dialect] for name in (*group, "prompt"))
        messages = (m for chat in chats for m in (chat if isinstance(chat, list) else [chat]) if isinstance(m, dict))
        keys.update({key for message in messages for key in carried_keys(message)})
    return {"columns": dict(columns.most_common()), "message_keys": dict(keys.most_common())}


def answer_text(messages: list[Message]) -> str:
    """What would be supervised: the assistant turns that are not context (or the whole of a plain text)."""
    return "\n".join(m["content"] for m in messages if is_learnt(m))


def whole_text(messages: list[Message]) -> str:
    """All turns but a system one."""
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def encode(
    model: ModelSpec, messages: list[list[Message]]
) -> tuple[Encoder, list[int], list[tuple[int, str, str]], list[str]]:
    """The encoder, each row's supervised tokens (0: refused), refusals (index, reason, detail), dropped thinking."""
    from keepset.model.encode import Encoder, encode_all, what_is_lost
    from keepset.model.load import load_tokenizer

    encoder = Encoder(load_tokenizer(model), model)
    rows, refused = encode_all(encoder, messages)
    drops = what_is_lost(row for row in rows if row is not None)
    return encoder, [0 if row is None else int(row.supervised.sum()) for row in rows], refused, drops


def reasons(quarantine: Sequence[Quarantined], refused: list[tuple[int, str, str]], pool: Pool) -> list[dict[str, Any]]:
    """Bad rows by reason, most frequent first, each with the first place it was met."""
    places: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for q in quarantine:
        places[q.reason].append({"file": q.file, "line": q.line, "detail": q.detail, "excerpt": q.excerpt})
    files, lines = pool.table["file"], pool.table["line"]
    for index, reason, detail in refused:
        where = {"file": files[index].as_py(), "line": lines[index].as_py()}
        places[reason].append({**where, "detail": detail, "excerpt": ""})
    return [
        {"reason": name, "rows": len(cases), "meaning": REASONS.get(name) or TEMPLATE_REASONS.get(name, ""),
         "first": cases[0]}
        for name, cases in sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    ]  # fmt: skip


def lengths(counts: Sequence[int], unit: str) -> dict[str, Any] | None:
    """Quantiles and a power-of-two histogram of the answers' lengths; None without a row."""
    if not counts:
        return None
    values = np.asarray(counts)
    top = int(np.ceil(np.log2(max(2, values.max() + 1))))
    edges = [0, *(2**k for k in range(2, max(3, top + 1)))]
    quantiles = {f"p{q}": float(np.quantile(values, q / 100)) for q in (10, 50, 90, 99)}
    histogram = [
        {"from": low, "to": high - 1, "rows": int(((values >= low) & (values < high)).sum())}
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    return {"unit": unit, "total": int(values.sum()), "mean": float(values.mean()), "min": int(values.min()),
            "max": int(values.max()), **quantiles, "histogram": histogram}  # fmt: skip


def pair_facts(target: Target) -> dict[str, Any]:
    """Chosen against rejected: tasks, and how far length alone would tell them apart (in characters)."""
    sides = [
        (sum(len(m["content"]) for m in chosen), sum(len(m["content"]) for m in rejected))
        for _, chosen, rejected in (target.pair(i) for i in range(len(target)))
        if rejected is not None
    ]
    matched = [abs(c - r) <= LENGTH_MATCH * max(c, r) for c, r in sides]
    return {
        "pairs": len(sides),
        "tasks": dict(Counter(str(t) for t in target.tasks)),
        "chosen_longer": float(np.mean([c > r for c, r in sides])) if sides else None,
        "length_matched": float(np.mean(matched)) if sides else None,
    }


def leakage(pool: Pool, messages: list[list[Message]], target: Target, name: str) -> dict[str, Any]:
    """Rows that a target or evaluation set already holds: exactly (case and white space aside), or nearly."""
    exact = find_leaks(pool, target)
    sides = [
        (whole_text([*prompt, *side]), answer_text(side))
        for prompt, chosen, rejected in (target.pair(i) for i in range(len(target)))
        for side in (chosen, rejected)
        if side is not None
    ]
    near = near_pairs([whole_text(row) for row in messages], [whole for whole, _ in sides], NEAR)
    # An answer alone is evidence too, if it is long enough not to be a stock phrase.
    answers = [answer_text(row) for row in messages]
    answers = [text if n >= LEAK_WORDS else "" for text, n in zip(answers, count_words(answers), strict=True)]
    near |= near_pairs(answers, [answer for _, answer in sides], NEAR)
    only_near = sorted(i for i in near if not exact[i])
    first = [i for i in range(len(pool)) if exact[i]][:3] + only_near[:3]
    return {
        "against": name,
        "path": ", ".join(sorted({info.file for info in target.files})),
        "rows": len(target),
        "exact": dict(Counter(str(kind) for kind in exact if kind)),
        "near": len(only_near),
        "first": [{"id": str(pool.ids[i]), "file": pool.table["file"][i].as_py(), "line": pool.table["line"][i].as_py(),
                   "kind": str(exact[i]) or "near"} for i in first],
    }  # fmt: skip


def examples(
    pool: Pool, messages: list[list[Message]], texts: list[str], encoder: Encoder | None
) -> list[dict[str, Any]]:
    """Three rows: the first, one of middle length and the longest; rendered, where there is a template.

    `pieces` are [text, supervised] in order; without an encoder the assistant's text counts as supervised.
    """
    if not len(pool):
        return []
    order = np.argsort([len(text) for text in texts], kind="stable")
    chosen = dict.fromkeys([0, int(order[len(order) // 2]), int(order[-1])])
    out = []
    for i in chosen:
        place = {"file": pool.table["file"][i].as_py(), "line": pool.table["line"][i].as_py()}
        out.append({"id": str(pool.ids[i]), **place, **rendered(messages[i], encoder)})
    return out


def rendered(messages: list[Message], encoder: Encoder | None) -> dict[str, Any]:
    """One row as [text, supervised] pieces, or why it is refused."""
    if encoder is None:
        parts = [([f"{m['role']}: ", False], [m["content"], is_learnt(m)]) for m in messages]
        return {"pieces": [piece for part in parts for piece in (*part, ["\n", False])]}
    from keepset.model.encode import RowRefused

    try:
        row = encoder.encode(messages)
    except RowRefused as refusal:
        return {"pieces": [], "refused": str(refusal)}
    cuts = [0, *(np.flatnonzero(np.diff(row.supervised.astype(np.int8))) + 1).tolist(), len(row.input_ids)]
    pieces = [
        [encoder.tokenizer.decode(row.input_ids[a:b].tolist()), bool(row.supervised[a])]
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    return {"pieces": pieces, "tokens": len(row.input_ids), "supervised": int(row.supervised.sum())}


def advice(facts: dict[str, Any]) -> list[str]:
    """One line for each thing that should be mended before a run."""
    lines = []
    bad = sum(entry["rows"] for entry in facts["reasons"])
    if bad > 0.05 * max(1, facts["rows_in"]):
        lines.append(f"{bad} of {facts['rows_in']} rows can't be used: see the reasons, or name the pool's `format`")
    if facts["duplicates"]:
        lines.append(f"{facts['duplicates']} exact copies: set `select: {{dedup: exact}}`, so that none is kept twice")
    if facts["near_duplicates"] > facts["duplicates"] + 0.02 * facts["rows"]:
        lines.append(f"{facts['near_duplicates']} near copies: set `select: {{dedup: near}}`")
    for leak in facts["leakage"]:
        n = sum(leak["exact"].values()) + leak["near"]
        if n:
            lines.append(f"{n} rows stand in the {leak['against']} ({leak['path']}) as well: take them out of the data")
    pairs = facts["pairs"]
    if pairs and pairs["chosen_longer"] is not None and abs(pairs["chosen_longer"] - 0.5) > 0.2:
        lines.append(f"chosen is longer in {pairs['chosen_longer']:.0%} of the pairs, so length alone may decide; "
                     "set `length_matched: true`, or read the length-matched figures")  # fmt: skip
    return lines


def print_inspection(facts: dict[str, Any], console: Console) -> None:
    """Print what `inspect_data` found. Supervised text is green and underlined, or in «» where there is no colour."""
    container = ", ".join(facts["container"]) or "?"
    console.print(Text(facts["path"], style="bold") + Text(f": {facts['format']} in {container}"))
    console.print(
        f"rows: {facts['rows_in']} in = {facts['rows']} usable + {facts['quarantined']} quarantined; "
        f"{facts['duplicates']} exact copies, {facts['near_duplicates']} near copies",
        highlight=False,
    )
    console.print(f"columns: {', '.join(facts['columns'])}", highlight=False, markup=False)
    for kind, counts in facts["carried"].items():
        if counts:
            listed = ", ".join(
                f"{name} ({n} rows{'; ' + NOTES[name] if name in NOTES else ''})" for name, n in counts.items()
            )
            console.print(f"{kind.replace('_', ' ')} carried along, not used: {listed}", highlight=False, markup=False)
    for name in ("roles", "sources", "categories"):
        if facts[name]:
            shown = " · ".join(f"{key} {n}" for key, n in facts[name].items())
            console.print(f"{name}: {shown}", highlight=False, markup=False)
    if facts["pairs"]:
        p = facts["pairs"]
        longer = "" if p["chosen_longer"] is None else (
            f"; chosen is longer in {p['chosen_longer']:.0%}, sides within 20 % in {p['length_matched']:.0%}"
        )  # fmt: skip
        tasks = ", ".join(f"{task} {n}" for task, n in list(p["tasks"].items())[:8])
        console.print(f"pairs: {p['pairs']} in {len(p['tasks'])} tasks ({tasks}){longer}",
                      highlight=False, markup=False)  # fmt: skip
    print_lengths(facts["lengths"], console)
    print_reasons(facts["reasons"], console)
    for line in facts["drops"]:
        console.print(line, highlight=False)
    for leak in facts["leakage"]:
        exact = ", ".join(f"{kind} {n}" for kind, n in leak["exact"].items()) or "none"
        console.print(f"in the {leak['against']} as well ({leak['path']}): exact {exact}; near {leak['near']}",
                      highlight=False, markup=False)  # fmt: skip
        for row in leak["first"]:
            console.print(f"  {row['file']}:{row['line']} {row['kind']}", highlight=False, markup=False)
    for row in facts["examples"]:
        print_example(row, console)
    for line in facts["advice"]:
        console.print(Text("→ ", style="bold yellow") + Text(line))


def print_lengths(lengths: dict[str, Any] | None, console: Console) -> None:
    """Quantiles in a line, and a bar for each bucket."""
    if lengths is None:
        return
    console.print(
        f"answers: {lengths['total']:,} {lengths['unit']}; mean {lengths['mean']:.1f}, median {lengths['p50']:.0f}, "
        f"90 % up to {lengths['p90']:.0f}, longest {lengths['max']}",
        highlight=False,
    )
    most = max(bucket["rows"] for bucket in lengths["histogram"]) or 1
    for bucket in lengths["histogram"]:
        bar = "█" * round(30 * bucket["rows"] / most) or ("▏" if bucket["rows"] else "")
        console.print(f"{bucket['from']:>7}–{bucket['to']:<7}{bucket['rows']:>8}  {bar}", highlight=False)


def print_reasons(reasons: list[dict[str, Any]], console: Console) -> None:
    """The bad rows as a table."""
    if not reasons:
        return
    table = Table("rows", "reason", "first at", "detail", box=None, pad_edge=False)
    for entry in reasons:
        first = entry["first"]
        table.add_row(
            str(entry["rows"]), entry["reason"], Text(f"{first['file']}:{first['line']}"), Text(first["detail"])
        )
    console.print(table)


def print_example(row: dict[str, Any], console: Console) -> None:
    """One row as the model will see it."""
    size = f", {row['supervised']} of {row['tokens']} tokens supervised" if "tokens" in row else ""
    console.print(Text(f"— {row['file']}:{row['line']} (id {row['id'][:12]}{size})", style="dim"))
    if row.get("refused"):
        console.print(Text(f"refused: {row['refused']}", style="red"))
    colour = console.is_terminal and not console.no_color
    text, left = Text(), EXAMPLE_CHARACTERS
    for piece, supervised in row["pieces"]:
        shown = piece if len(piece) <= left else piece[:left] + " …"
        left = max(0, left - len(piece))
        if supervised:
            text.append(shown if colour else f"«{shown}»", style="green underline")
        else:
            text.append(shown)
        if not left:
            break
    console.print(text)
