"""The house: which room may import which, how long a file may be, and that the README's map is the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/keepset"
TESTS = ROOT / "tests"

ROOMS = [
    "cli", "deliver", "report", "judging", "pipeline", "selection", "methods", "stages", "train", "evaluate",
    "features", "model", "data", "runfolder", "root",
]  # fmt: skip
"""Top to bottom: a file imports from its own room and those below, also inside functions."""

UPWARD = {
    "keepset.methods.cross_fit": {"keepset.selection.dedup"},
    "keepset.methods.perplexity": {"keepset.selection.ranking"},
    "keepset.methods.table": {"keepset.pipeline.score_key"},
    "keepset.pipeline.run": {"keepset.deliver.card", "keepset.deliver.trainers", "keepset.report"},
    "keepset.pipeline.variants": {"keepset.report.overlap"},
    "keepset.stages.counts": {
        "keepset.methods.cross_fit", "keepset.methods.gradient", "keepset.methods.table", "keepset.pipeline.learn",
        "keepset.pipeline.reference_check",
    },
    "keepset.stages.losses": {"keepset.methods.cross_fit"},
    "keepset.stages.shapley": {"keepset.methods.in_run_shapley", "keepset.methods.tmc_shapley"},
}  # fmt: skip
"""Imports that still go up: each is to go away, none may be added."""

LONG = {
    "evaluate/statistics.py", "methods/table.py", "runfolder/run.py", "stages/counts.py", "stages/losses.py",
}  # fmt: skip
"""Files that are still too long: none may be added."""

LONGEST = 400


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(("keepset", *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "root"


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of keepset that a file imports, those for types only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for_types |= {inner for line in node.body for inner in ast.walk(line)}
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keepset":
            found |= {full if (full := f"{node.module}.{a.name}") in known else str(node.module) for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "keepset"}
    return found


def test_no_import_goes_up_but_those_that_are_listed() -> None:
    known = modules()
    assert {room(m) for m in known} == set(ROOMS)
    upward: dict[str, set[str]] = {}
    for module, path in known.items():
        for target in imported(path, known):
            if ROOMS.index(room(target)) < ROOMS.index(room(module)) and module not in (
                "keepset.__main__",
                "keepset.encoding",
            ):
                upward.setdefault(module, set()).add(target)
    assert upward == UPWARD


def test_no_test_file_imports_from_another() -> None:
    """What several test files share is in conftest.py or in a file of its own beside it."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[-1].startswith("test_") for name in named), f"{path}:{node.lineno}"


def test_no_file_is_longer_than_four_hundred_lines_but_those_that_are_listed() -> None:
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.rglob("*.py")}
    long = {p.relative_to(SOURCE).as_posix() for p, n in lines.items() if n > LONGEST}
    assert long == LONG


def test_the_map_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## The map")[1].split("```")[1]
    named = [line.split("  ")[0].split() for line in re.findall(r"^  (\S.*)$", text, flags=re.M)]
    paths = {word for words in named for word in words}
    there = {p.name + "/" for p in SOURCE.iterdir() if p.is_dir() and p.name not in ("__pycache__", "demo")}
    assert {word for word in paths if word.endswith("/")} == there
    assert all((SOURCE / word).exists() for word in paths)


def test_every_source_file_that_pages_and_docstrings_name_is_there() -> None:
    made_up = {"methods/yours.py", "methods/distinct.py"}  # what whoever adds a method writes
    rooms = "|".join(ROOMS[:-1])
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *SOURCE.rglob("*.py")]:
        for name in re.findall(rf"\b((?:{rooms})/(?!test_)[a-z_]+\.py)\b", page.read_text(encoding="utf-8")):
            assert name in made_up or (SOURCE / name).exists(), f"{page.name} names {name}"
