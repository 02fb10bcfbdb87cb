"""Write docs/cli.md from the commands' own help: `python docs/make_cli.py`. A test checks that the page is current."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from typer.main import get_command

from keepset.cli import app

HEAD = """# Command line

Made from the commands' own help by `python docs/make_cli.py`. Long options are taken with `_` or `-`.

Exit codes: 0 done; 2 a mistake in options, recipe or model; 3 the run folder is of another recipe; 4 data refused;
5 `reproduce` found a difference; 130 stopped from the keyboard, 143 by a signal: the same command goes on.
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for name, command in sorted(commands()):
        text, _, example = inspect.cleandoc(command.help or "").partition("Example:")
        arguments = [f" {p.name.upper()}" if p.required else f" [{p.name.upper()}]"
                     for p in command.params if p.param_type_name == "argument"]  # fmt: skip
        parts.append(
            f"## keepset {name}{''.join(arguments)}\n\n{text.strip()}\n\n```console\n$ {example.strip()}\n```\n"
        )
        rows = [f"| {', '.join(f'`{o}`' for o in p.opts + p.secondary_opts)} | {p.help or ''} | {default(p)} |"
                for p in command.params if p.param_type_name == "option" and p.name != "help"]  # fmt: skip
        if rows:
            parts.append("\n".join(["| option | meaning | default |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def commands() -> list[tuple[str, Any]]:
    """Every command with its whole name, those of groups too."""
    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [(f"{name} {k}", c) for k, c in inner.items()] if inner else [(name, command)]
    return found


def default(parameter: object) -> str:
    """An option's default, as a table cell."""
    value = getattr(parameter, "default", None)
    return "" if value is None or value is False else f"`{value}`"


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(page(), encoding="utf-8")
