"""The table of `keepset validate` on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from keepset.pipeline.tell_truth import HEADINGS, print_validation
from keepset.pipeline.validate import OUTCOMES
from keepset.runfolder.truth import Validation
from report_fixture import validation


def shown(value: dict, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_validation(Validation.from_json(value, "x"), console)
    return console.file.getvalue()


def test_every_score_stands_beside_the_ceiling():
    text = shown({**validation(), "unscored": {"davir": 3}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "60 trainings on random halves of 200 rows" in lines[0]
    assert "a perfect score +0.81 +0.71 –" in lines and "two seeds agree +0.66 +0.50 –" in lines
    assert (
        "rose +0.42 +0.32 –" in lines and lines[lines.index("rose +0.42 +0.32 –") + 1] == "+0.30 +0.53 +0.20 +0.43 – –"
    )
    assert "rose +0.94" in lines and "p < 0.001" in lines
    assert "davir: 3 of 200 rows have no score and count as its mean" in lines


def test_a_narrow_terminal_gets_several_tables_and_whole_names():
    assert set(OUTCOMES) == set(HEADINGS)
    every = validation()
    (design,) = every["designs"]
    have = [o["name"] for o in design["outcomes"]]
    for name in [name for name in OUTCOMES if name not in have]:
        design["outcomes"].append({**design["outcomes"][0], "name": name})
        design["scores"] += [{**s, "outcome": name} for s in design["scores"] if s["outcome"] == "loss.target"]
    for width, tables in ((120, 1), (80, 2), (50, 4)):
        text = shown(every, width)
        assert len(re.findall("a perfect score +[+–]", text)) == 2 * tables and text.count("random-0") == 2 * tables
        assert "…" not in text and max(map(len, text.split("below:")[0].splitlines())) <= width
