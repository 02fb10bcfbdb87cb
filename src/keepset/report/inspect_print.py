"""What `keepset inspect` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepset.data.fields import NOTES

EXAMPLE_CHARACTERS = 900


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
    for kind, found in facts["carried"].items():
        if found:
            told = ", ".join(
                f"{name} ({n} rows{'; ' + NOTES[name] if name in NOTES else ''})" for name, n in found.items()
            )
            console.print(f"{kind.replace('_', ' ')} carried along, not used: {told}", highlight=False, markup=False)
    for name in ("roles", "sources", "categories"):
        if facts[name]:
            shown = " · ".join(f"{key} {n}" for key, n in facts[name].items())
            console.print(f"{name}: {shown}", highlight=False, markup=False)
    if facts["pairs"]:
        p = facts["pairs"]
        told = "" if p["chosen_longer"] is None else (
            f"; chosen is longer in {p['chosen_longer']:.0%}, sides within 20 % in {p['length_matched']:.0%}"
        )  # fmt: skip
        tasks = ", ".join(f"{task} {n}" for task, n in list(p["tasks"].items())[:8])
        console.print(f"pairs: {p['pairs']} in {len(p['tasks'])} tasks ({tasks}){told}", highlight=False, markup=False)
    print_lengths(facts["lengths"], console)
    print_reasons(facts["reasons"], console)
    for line in facts["drops"]:
        console.print(line, highlight=False)
    for leak in facts["leakage"]:
        found = ", ".join(f"{kind} {n}" for kind, n in leak["exact"].items()) or "none"
        console.print(f"in the {leak['against']} as well ({leak['path']}): exact {found}; near {leak['near']}",
                      highlight=False, markup=False)  # fmt: skip
        for row in leak["first"]:
            console.print(f"  {row['file']}:{row['line']} {row['kind']}", highlight=False, markup=False)
    for row in facts["examples"]:
        print_example(row, console)
    for line in facts["advice"]:
        console.print(Text("→ ", style="bold yellow") + Text(line))


def print_lengths(found: dict[str, Any] | None, console: Console) -> None:
    """Quantiles in a line, and a bar for each bucket."""
    if found is None:
        return
    console.print(
        f"answers: {found['total']:,} {found['unit']}; mean {found['mean']:.1f}, median {found['p50']:.0f}, "
        f"90 % up to {found['p90']:.0f}, longest {found['max']}",
        highlight=False,
    )
    most = max(bucket["rows"] for bucket in found["histogram"]) or 1
    for bucket in found["histogram"]:
        bar = "█" * round(30 * bucket["rows"] / most) or ("▏" if bucket["rows"] else "")
        console.print(f"{bucket['from']:>7}–{bucket['to']:<7}{bucket['rows']:>8}  {bar}", highlight=False)


def print_reasons(found: list[dict[str, Any]], console: Console) -> None:
    """The bad rows as a table."""
    if not found:
        return
    table = Table("rows", "reason", "first at", "detail", box=None, pad_edge=False)
    for entry in found:
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
