"""The house: which room may import which, how long a file may be, and that the pages name what is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from keepset.runfolder import layout

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/keepset"
TESTS = ROOT / "tests"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = script("make_architecture")
ROOMS, modules, room, imported = house.ROOMS, house.modules, house.room, house.imported

DOORS = {
    "keepset.__main__": {"keepset.cli"},
    "keepset.encoding": {"keepset.model.encode"},
    "keepset.pipeline": {"keepset.deliver.finish"},
}
"""Imports that go up and stay: `python -m keepset`, and two names where users import them from (`run_recipe`)."""

BACK = "keepset.model.pack", "keepset.model.check"
"""The one import that closes a circle: a model that was never checked is checked when it is first used: it is run."""

LONGEST = 400

OTHER_FOLDERS = {"data/readers.py": {"data"}, "model/gguf.py": {"models", ".lock"}}
"""Names of the layout in folders that are no run's: a data set's own, and the cache of converted models."""


OF_SEVERAL = {"methods/test_contract.py", "methods/test_docs.py", "methods/test_losses.py", "methods/test_planted.py"}
"""Test files that stand in a room for several of its modules."""


def test_no_import_goes_up_but_the_doors() -> None:
    known = modules()
    assert {room(m) for m in known} == set(ROOMS)
    upward: dict[str, set[str]] = {}
    for module, path in known.items():
        for target in imported(path, known):
            if ROOMS.index(room(target)) < ROOMS.index(room(module)):
                upward.setdefault(module, set()).add(target)
    assert upward == {} | DOORS


def test_no_test_file_imports_from_another() -> None:
    """What several test files share is in conftest.py or in a file of its own beside it."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[-1].startswith("test_") for name in named), f"{path}:{node.lineno}"


def test_tests_stand_where_one_looks_for_them() -> None:
    """`tests/room/test_module.py`, or `test_module_*.py`, of a module in that room; a room's own under its name."""
    strays = set()
    for path in TESTS.glob("*/test_*.py"):
        folder = SOURCE / path.parent.name
        modules = {(p.parent.name if p.stem == "__init__" else p.stem).strip("_") for p in folder.rglob("*.py")}
        of = path.stem.removeprefix("test_")
        if not any(of == module or of.startswith(f"{module}_") for module in modules):
            strays.add(path.relative_to(TESTS).as_posix())
    assert strays == OF_SEVERAL


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Also inside functions: a circle that Python doesn't see is one that a reader walks."""
    known = modules()
    arrows = {module: imported(path, known) & set(known) - {module} for module, path in known.items()}
    assert BACK[1] in arrows[BACK[0]]
    arrows[BACK[0]] = arrows[BACK[0]] - {BACK[1]}
    while free := [module for module, targets in arrows.items() if not targets & set(arrows)]:
        arrows = {module: targets for module, targets in arrows.items() if module not in free}
    assert sorted(arrows) == []


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCE.rglob("*.py")}
    assert {p.relative_to(SOURCE).as_posix() for p, n in lines.items() if n > LONGEST} == set()


def names_of_the_layout() -> tuple[set[str], set[str]]:
    """Every file name (it has a dot) and folder name that `layout` gives, also in the paths that it puts together."""
    made = [layout.scores("x"), layout.subset("x"), layout.reference(), layout.reference(0), layout.in_run("x"),
            layout.model("x", 0), layout.epochs("x", 0), layout.stage("x", "y"), layout.retraining("x"),
            layout.validation_model("x", 0), layout.validation_measured("x", 0)]  # fmt: skip
    constants = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
    parts = {part for path in [*constants, *made] for part in PurePosixPath(path).parts}
    own = {part for part in parts if not re.match(r"x|y$|.*-(x|seed0|fold0)\b", part)}
    return {part for part in own if "." in part}, {part for part in own if "." not in part}


def spelt_out(path: Path) -> set[str]:
    """The literals of a file that spell a name of the layout out.

    A docstring and a text for people (any literal with a blank, the stages' names in costs.jsonl too) may name a file.
    Any other literal may not hold a file's name, nor a folder's before a `/`, nor a folder's alone as a part of a path
    put together by `/`; nor end in `-seed`, by which a subset's model is named.
    """
    files, folders = names_of_the_layout()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    joined = {side for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
              for side in (node.left, node.right)}  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docstrings:
            continue
        text = node.value
        *before, last = text.split("/")
        if re.search(r"\s", text):
            continue
        if files & {*before, last} or folders & {*before} or (node in joined and text in folders):
            found.add(text)
        if re.search(r"(^|[^-])-seed$", text):
            found.add(text)
    return found


def test_the_names_in_a_run_folder_stand_in_the_layout_alone() -> None:
    spelt = {p.relative_to(SOURCE).as_posix(): spelt_out(p) for p in SOURCE.rglob("*.py") if p.name != "layout.py"}
    assert {file: names for file, names in spelt.items() if names} == OTHER_FOLDERS


def test_a_name_spelt_out_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        'def f(run, label, seed):\n    """Writes scores/x.parquet and subsets.json."""\n'
        '    run.say(f"{run}: no scores/ in this folder")\n'
        '    return (run / "scores", f"scores/{label}.parquet", f"{label}-seed{seed}", run.subsets["scores"],\n'
        '            run / "x/done.json", "subsets.json", "--seed", "data", "costs.jsonl is not there")\n'
    )
    assert spelt_out(file) == {"scores", "scores/", "-seed", "x/done.json", "subsets.json"}


def test_the_architecture_page_names_every_room() -> None:
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("| room | what is in it |")[1]
    rows = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()[2:]]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name not in ("__pycache__", "demo")}


def test_every_source_file_that_pages_and_docstrings_name_is_there() -> None:
    made_up = {"methods/yours.py", "methods/distinct.py"}  # what whoever adds a method writes
    rooms = "|".join(ROOMS[:-1])
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *SOURCE.rglob("*.py")]:
        for name in re.findall(rf"\b((?:{rooms})/(?!test_)[a-z_]+\.py)\b", page.read_text(encoding="utf-8")):
            assert name in made_up or (SOURCE / name).exists(), f"{page.name} names {name}"


def test_the_picture_of_the_rooms_is_current() -> None:
    """Rooms, files and arrows to the letter, lines within a tenth, so that not every commit changes the picture."""
    there, made = house.PICTURE.read_text(encoding="utf-8"), house.picture()
    lines = re.compile(r"([\d,]+) lines")
    assert lines.sub("lines", there) == lines.sub("lines", made), "run `python docs/make_architecture.py`"
    for old, new in zip(lines.findall(there), lines.findall(made), strict=True):
        assert int(old.replace(",", "")) == pytest.approx(int(new.replace(",", "")), rel=0.1)


def test_an_arrow_of_the_picture_is_an_import() -> None:
    arrows = house.arrows()
    assert arrows["judging", "evaluate"] == sum(
        "from keepset.evaluate" in p.read_text(encoding="utf-8") for p in (SOURCE / "judging").glob("*.py")
    )
    assert ("data", "model") not in arrows


def test_the_page_on_the_architecture_names_what_is_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"((?:`[\w.]+`(?:, | and )?)+)\s+(?:\(|in\s+)`([a-z_]+(?:/[a-z_]+)?\.py)`", text)
    assert len(named) > 25
    for names, file in named:
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        for name in re.findall(r"`([\w.]+)`", names):
            assert set(name.split(".")) <= defined, f"{file} has no {name}"
