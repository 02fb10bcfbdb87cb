"""The example of docs/adding-a-method.md works as printed."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from keepset.methods import table as scoring
from keepset.recipe import MethodSpec

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_example_method_runs_is_listed_and_has_checked_options(monkeypatch):
    monkeypatch.setattr(scoring, "METHODS", dict(scoring.METHODS))
    text = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    method_lines = [line for line in blocks[0].split('"""\n', 1)[1].splitlines() if line.strip()]
    assert len(method_lines) <= 15
    space: dict = {}
    for block in blocks:
        exec(compile(block, "adding-a-method.md", "exec"), space)
    space["test_distinct_by_hand"]()
    job = SimpleNamespace(texts=lambda: ["one two one two", "all words differ here", "alone"])
    scored = scoring.METHODS["distinct"].score(job, n=2)
    np.testing.assert_allclose(scored.score, [2 / 3, 1.0, np.nan])
    scoring.check_options(MethodSpec(name="distinct", options={"n": 3}))


def test_every_method_file_is_in_the_docs():
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    files = {path.name for path in (DOCS.parent / "src" / "keepset" / "methods").glob("*.py")}
    missing = {name for name in files - {"__init__.py", "table.py", "gradient.py"} if f"`{name}`" not in text}
    assert not missing
    named = set(re.findall(r"`([a-z0-9_]+\.py)`", text))
    assert named <= files | {path.name for path in (DOCS.parent / "src" / "keepset" / "selection").glob("*.py")}
