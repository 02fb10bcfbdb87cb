"""Every kind of warning has a remedy, and its command is one that the command line takes."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import keepset.pipeline.findings
import keepset.pipeline.reference_check
from keepset.cli import app
from keepset.cli.options import apply_setting
from keepset.methods.table import check_options
from keepset.pipeline.remedies import REMEDIES, kinds
from keepset.recipe import MethodSpec, Recipe, parse_recipe
from keepset.runfolder.records import Finding

RUN = Path("runs/my run")
ROSE = {"name": "rose", "label": "rose-2", "options": {"reduce": "mean"}}
NOTES = {"length-before-after"}
BUILT = {"{}-in-pool": ("target-in-pool", "evaluation-in-pool"), "{}-shares": ("source-shares", "category-shares")}


def recipe(**more: Any) -> Recipe:
    return parse_recipe(
        {"pool": ["pool.jsonl"], "target": ["t.jsonl"], "methods": [ROSE, "davir"], "budget": "15%",
         "evaluate": {"pairs": [{"path": "e.jsonl"}]}, **more}, where="test"
    )  # fmt: skip


def names_in(module: Any) -> set[str]:
    """The names of findings that a module makes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("add", "Finding") and node.args:
            first = node.args[0]
            if isinstance(first, ast.JoinedStr):
                found |= set(BUILT["".join("{}" if not isinstance(v, ast.Constant) else v.value for v in first.values)])
            elif isinstance(first, ast.Constant):
                found.add(first.value)
    return found


def test_every_finding_has_a_remedy() -> None:
    made = names_in(keepset.pipeline.findings) | names_in(keepset.pipeline.reference_check)
    named = {"no-better-than-random", "worse-than-random"}  # by a variable
    assert made - NOTES | named == set(REMEDIES)


def finding(name: str, **more: Any) -> Finding:
    text = (
        "2 of 9 chosen rows are within numerical noise of rows left out: 3f2a, 77b1, ..."
        if name == "stability"
        else "x"
    )
    return Finding(name, "warning", "rose-2@5%", more.get("figure", 0.7), text, "advice")


@pytest.mark.parametrize("figure", [0.7, -0.7])
@pytest.mark.parametrize("name", REMEDIES)
def test_every_remedy_is_a_command_that_the_parser_takes(name: str, figure: float) -> None:
    for made in (recipe(), recipe(budget=["5%", 200], controls={"longest": True, "shortest": True})):
        (kind,) = kinds([finding(name, figure=figure)], RUN, made)
        program, word, *words = shlex.split(kind.command)
        command = typer.main.get_command(app).commands[word]  # type: ignore[attr-defined]
        parsed = command.make_context(word, list(words), resilient_parsing=False).params
        assert program == "keepset" and kind.title and ("my run" in kind.command or word == "inspect")
        data = made.model_dump(mode="json")
        for setting in parsed.get("settings") or []:
            apply_setting(data, setting)
        parse_recipe(data, where=kind.command)
        if word == "score":
            options: dict[str, Any] = {}
            for text in parsed["option"]:
                apply_setting(options, text, "-o")
            check_options(MethodSpec(name=parsed["method"], label=parsed["label"], options=options))
            assert options == {"reduce": "mean", "map": "precondition"}
        asked = {k: parsed[k] for k in ("policy", "quota", "quota_by", "dedup") if parsed.get(k)}
        parse_recipe({**data, "select": asked, "budget": parsed.get("budget") or "5%"}, where=kind.command)
        if name == "stability":
            assert parsed["row"] == "3f2a"


def test_kinds_come_gravest_first_with_their_methods_together_and_answered_ones_as_notes() -> None:
    found = [finding("duplicates"), finding("category-shares"), Finding("kept-length", "info", "rose-2", 1, "t", "a"),
             Finding("category-shares", "warning", "davir", 1, "t", "a"), finding("target-in-pool")]  # fmt: skip
    made = kinds(found, RUN, recipe())
    assert [(k.name, k.level) for k in made] == [
        ("target-in-pool", "warning"), ("category-shares", "warning"), ("duplicates", "warning"),
        ("kept-length", "info"),
    ]  # fmt: skip
    assert [f.method for f in made[1].findings] == ["rose-2@5%", "davir"] and made[3].command == ""
    taken_out = kinds(found, RUN, recipe(select={"dedup": "exact"}))
    assert [k.name for k in taken_out if k.level == "warning"] == ["target-in-pool", "category-shares"]
    assert next(k for k in taken_out if k.name == "duplicates").advice.endswith("select.dedup is exact")
    assert kinds(found, RUN, None)[0].command == "" and kinds([], RUN, None) == []
