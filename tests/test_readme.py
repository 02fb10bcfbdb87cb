"""The README's commands, run as they are written, on rows of every family of dialects and a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import save_tiny
from data_rows import PAIRS, SFT, lines, write_lines
from keepset.cli import app
from keepset.methods.table import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def commands(heading: str) -> list[list[str]]:
    """The words of the commands in the first block below a heading, comments left out."""
    block = README.split(f"## {heading}\n")[1].split("```console\n")[1].split("```")[0]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in block.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, max_position_embeddings=512)
    return folder


@pytest.mark.parametrize(("pool", "pairs"), zip(SFT, PAIRS, strict=True))
def test_own_data_in_three_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, pool: str, pairs: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(model)
    rows = lines(pool, 40)
    write_lines(tmp_path / "pool.jsonl", rows)
    write_lines(tmp_path / "pairs.jsonl", lines(pairs, 4))
    three = commands("Your own data")
    assert [words[:2] for words in three] == [["keepset", "score"], ["keepset", "select"], ["keepset", "train"]]
    for words in three:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output)
    chosen = (tmp_path / "chosen.jsonl").read_bytes().splitlines()
    assert len(chosen) == 2 and set(map(json.dumps, map(json.loads, chosen))) < set(
        map(json.dumps, map(json.loads, rows))
    )
    assert list(tmp_path.glob("runs/keepset/models/rose-*/adapter_model.safetensors"))


def test_the_methods_table_says_of_each_what_the_code_says() -> None:
    rows = [
        line.split("|")[1:3] for line in README.split("## Methods\n")[1].split("## ")[0].splitlines() if "| `" in line
    ]
    assert {name.strip(" `"): when.strip() for name, when in rows} == {m.name: m.when for m in METHODS.values()}


def test_the_readme_is_one_page() -> None:
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", README)
    assert len(text.splitlines()) <= 145 and len(text.split()) <= 1900
