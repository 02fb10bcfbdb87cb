"""The options that error messages, findings and help texts name exist: flags, recipe keys and options of methods."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

import keepset
from keepset.cli import app
from keepset.methods.table import METHODS
from keepset.recipe import Recipe

ROOT = Path(keepset.__file__).parent
DOCS = [
    p for p in (*ROOT.parents[1].glob("docs/*.md"), ROOT.parents[1] / "README.md") if p.name != "cli.md" and p.exists()
]

# What is named and is of other tools.
FLAGS = (
    "--no-deps --config --config_file --model --model_args --tasks --batch_size --output_path --include_path".split()
)
FLAGS += "--name --num_train_epochs --learning_rate".split()  # `train` takes any argument of TRL's configurations
WORDS = """attention_dropout modules_to_save report_to adamw_torch assistant_only_loss safe_serialization
build_store resize_token_embeddings run_rows weighted_mean tmc_shapley n_tokens loss_ini
loss_ref in_batch""".split()  # ... or of our own functions

OTHER = ("yaml", "jsonl", "py", "json", "safetensors", "safetensors.index.json", "eval", "language_model")
"""What follows `model.`, `train.` and the like in file names and in torch's own."""


def commands() -> dict[str, set[str]]:
    """Each command with the options it takes."""

    def walk(command: typing.Any, name: str) -> Iterator[tuple[str, set[str]]]:
        if hasattr(command, "commands"):
            for word, inner in command.commands.items():
                yield from walk(inner, f"{name} {word}".strip())
        else:
            yield name, {o for p in command.params for o in p.opts if o.startswith("--")} | {"--help"}

    return dict(walk(typer.main.get_command(app), ""))


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section of the recipe and those inside it."""
    yield model
    for field in model.model_fields.values():
        for kind in _models(field.annotation):
            yield from sections(kind)


def _models(annotation: typing.Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in typing.get_args(annotation) for m in _models(inner)]


COMMANDS = commands()
EVERY_FLAG = set().union(*COMMANDS.values())
KEYS = {name: field.annotation for section in sections(Recipe) for name, field in section.model_fields.items()}
OPTIONS = {(key, kind) for method in METHODS for key, (kind, _) in METHODS[method].options().items()}
NAMES = {*KEYS, *(key for key, _ in OPTIONS), *(f.strip("-") for f in EVERY_FLAG)}


def texts(path: Path) -> Iterator[str]:
    """A module's string literals of several words, docstrings left out; what is filled in stands as `{}`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    apart: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            apart.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            apart |= {id(v) for v in node.values}
    for node in ast.walk(tree):
        if id(node) in apart:
            continue
        if isinstance(node, ast.JoinedStr):
            found = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = node.value
        else:
            continue
        if found.strip().count(" ") > 1:
            yield found


def messages() -> Iterator[tuple[str, str]]:
    """What is said when something is wrong: the strings inside a raise, a finding, a quarantined row or a log line."""
    told = ("Error", "Refused", "Problem", "Mismatch", "Quarantined", "Finding", "warning", "say", "add", "append")
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith(told):
                    yield str(path.relative_to(ROOT)), ast.unparse(node)


def unknown_flags(text: str, flags: set[str]) -> list[str]:
    return [f for f in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if f not in flags and f not in FLAGS]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(path: Path) -> None:
    """In a module called like a command it must be that command's own."""
    own = {name for name in COMMANDS if name.split()[0] == path.stem.strip("_").split("_")[0]}
    flags = set().union(*(COMMANDS[name] for name in own)) if own and path.parent == ROOT else EVERY_FLAG
    wrong = {text: found for text in texts(path) if (found := unknown_flags(text, flags))}
    assert not wrong


@pytest.mark.parametrize("path", [*sorted(ROOT.rglob("*.py")), *DOCS], ids=lambda p: p.name)
def test_every_command_that_is_shown_takes_its_flags(path: Path) -> None:
    for line in re.findall(r"(?<![\w.])keepset ((?:[a-z-]+ ?)[^`\n\"|&;]*)", path.read_text(encoding="utf-8")):
        words = line.split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        if name in COMMANDS and not name.startswith("train"):  # `train` passes on what TRL's arguments have
            assert not unknown_flags(line, COMMANDS[name]), line


def test_every_dotted_key_that_is_named_is_in_the_recipe() -> None:
    wrong, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        for text in texts(path):
            for first, rest in re.findall(r"(?<![\w./])([a-z_]+)\.([a-z_.0-9]+[a-z_0-9])\b(?!\()", text):
                if first not in Recipe.model_fields or rest in OTHER:
                    continue
                seen += 1
                kinds: list[type[BaseModel]] = [Recipe]
                for word in (first, *rest.split(".")):
                    if word.isdecimal():
                        continue
                    fields = [k.model_fields[word] for k in kinds if word in k.model_fields]
                    if not fields:
                        wrong.append(f"{path.name}: {first}.{rest}")
                        break
                    kinds = [m for field in fields for m in _models(field.annotation)]
    assert not wrong and seen > 20


def test_every_setting_in_backticks_can_be_set() -> None:
    """`key: value` names a key of the recipe or an option of a method, and a value that it takes."""
    wrong, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        for text in texts(path):
            for said in re.findall(r"`(\{?[a-z_]+: [^`]+)`", text):
                for key, value in yaml.safe_load(said).items():
                    seen += 1
                    kinds = [KEYS[key]] if key in KEYS else [kind for name, kind in OPTIONS if name == key]
                    choices = {c for k in kinds for c in typing.get_args(k)} | {None}
                    typed = any(isinstance(value, k) for k in kinds if isinstance(k, type))
                    nested = isinstance(value, dict) and set(value) <= NAMES
                    if (
                        not kinds
                        or not (value in choices if isinstance(value, str) else typed or nested)
                        and not (str in kinds or key == "name")
                    ):
                        wrong.append(f"{path.name}: {said}")
    assert not wrong and seen > 8


def test_every_word_with_an_underscore_in_a_message_is_an_option() -> None:
    """Snake case in a message is a key, an option, a flag, or a stated word of another tool."""
    wrong = set()
    for path, call in messages():
        for text in ast.walk(ast.parse(call)):
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.count(" ") > 1:
                for word in re.findall(r"(?<![\w.'\"-])[a-z]+(?:_[a-z]+)+\b(?!\(|\.[a-z])", text.value):
                    if word not in NAMES and word not in WORDS:
                        wrong.add(f"{path}: {word}")
    assert not wrong
