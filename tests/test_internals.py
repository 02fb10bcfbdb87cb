"""docs/internals.md names every use of what other libraries keep to themselves, and nothing that is not there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/keepset"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
MODELS = ("model", "features", "train", "evaluate")  # the rooms that hold objects of these libraries
TREES = {p.relative_to(SOURCE).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in SOURCE.rglob("*.py")}


def rows() -> list[tuple[str, list[str], str]]:
    """Name, files and test of each row of the tables."""
    cells = [line.split(" | ") for line in (ROOT / "docs/internals.md").read_text().splitlines() if line[:3] == "| `"]
    return [(name[3:-1], re.findall(r"`([^`]+)`", files), test.strip("` |")) for name, files, _, test in cells]


def last(name: str) -> str:
    return name.rpartition(".")[2]


TABLE = {(last(name), file) for name, files, _ in rows() for file in files}


def resolve(name: str) -> Any:
    """What a dotted name stands for; of attributes that an instance gets, whether its class's source says so."""
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[k:-1]:
        found = getattr(found, part)
    if hasattr(found, parts[-1]):
        return True
    source = "".join(inspect.getsource(c) for c in (inspect.getmro(found)[:-1] if inspect.isclass(found) else [found]))
    return re.search(rf"\b{parts[-1]}\b", source) is not None


@pytest.mark.parametrize(("name", "files", "test"), rows())
def test_what_a_row_says_is_there(name: str, files: list[str], test: str) -> None:
    for library in ("torch", "transformers", "trl", "peft", "datasets", "tokenizers"):
        if name.startswith(library + "."):
            pytest.importorskip(library)
    if not last(name).startswith("keepset_"):
        assert resolve(name), f"{name} is gone"
    for file in files:
        assert re.search(rf"\b{last(name)}\b", (SOURCE / file).read_text(encoding="utf-8")), f"{file} has no {name}"
    file, _, function = test.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def declared(tree: ast.AST) -> set[str]:
    """Names that keepset itself gives to functions, classes, variables, fields and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None


def test_every_private_name_is_in_the_table() -> None:
    own = set().union(*(declared(tree) for tree in TREES.values())) | set(dir(importlib.import_module("os")))
    used = set()
    for file, tree in TREES.items():
        parts = {inner for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
        ends = {inner for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("endswith", "startswith", "removesuffix")) for inner in ast.walk(node)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                used.add((node.attr, file))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and private(node.value):
                if node not in parts | ends:
                    used.add((node.value, file))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                used |= {(name, file) for name in names if private(name)}
    old = {("_indices_data_files", "data/tables.py")}  # a key of files that datasets 1 wrote: they are refused
    assert used - TABLE == old
    assert {(n, f) for n, f in TABLE if private(n)} <= used | overridden()


def overridden() -> set[tuple[str, str]]:
    """Methods and attributes of classes in train/ that TRL's trainers or transformers' callbacks have too."""
    pytest.importorskip("trl")
    from transformers import TrainerCallback
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    theirs = {name for base in (DPOTrainer, RewardTrainer, SFTTrainer, TrainerCallback) for name in dir(base)}
    found = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree) if file.startswith("train/") else ():
            if isinstance(node, ast.ClassDef) and "dataclass" not in ast.unparse(ast.Module(node.decorator_list, [])):
                for inner in node.body:
                    names = declared(inner) if isinstance(inner, ast.Assign | ast.AnnAssign) else {
                        getattr(inner, "name", "")}  # fmt: skip
                    found |= {(name, file) for name in names if name in theirs and not name.startswith("__")}
    return found


def test_every_override_of_a_trainer_is_in_the_table() -> None:
    assert overridden() - TABLE == set()


def test_every_attribute_that_is_set_on_another_librarys_object_is_in_the_table() -> None:
    trees = {file: tree for file, tree in TREES.items() if file.startswith(MODELS)}
    fields = {
        line.target.id
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    set_here = set()
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                if ast.unparse(node.value) not in ("self", "ctx") and node.attr not in fields:
                    set_here.add((node.attr, file))
            elif isinstance(node, ast.Constant) and re.fullmatch(r"keepset_[a-z]+", str(node.value)):
                set_here.add((node.value, file))
    assert set_here - TABLE == {("keepset_segments", "model/check.py")}  # a keyword, see the page's last paragraph
