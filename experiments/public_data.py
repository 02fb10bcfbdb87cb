"""Reading the public data sets that the experiments use, and writing what they are built from."""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Read a .jsonl.zst file, line by line (a text may hold U+2028)."""
    with path.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        return [json.loads(line) for line in lines if line.strip()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def draw(rows: list[Row], n: int, seed: int = 0) -> list[Row]:
    """n rows at random."""
    return random.Random(seed).sample(rows, n)


def arguments(description: str) -> argparse.Namespace:
    """`--data FOLDER --out FOLDER`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="where the files go")
    return parser.parse_args()


def plain_prompt(text: str) -> str:
    """The question inside the ROSE files' Human / Assistant wrapping."""
    return text.strip().removeprefix("Human:").removesuffix("Assistant:").strip()
