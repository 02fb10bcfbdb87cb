"""The example of docs/adding-a-method.md works as printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import keepset

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_followed_to_the_letter_gives_a_method_that_scores(tmp_path):
    """On a copy of the package: the file, the word in the table, and the command that the page ends with."""
    text = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    file, line, test = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    package = shutil.copytree(Path(keepset.__file__).parent, tmp_path / "src/keepset")
    (package / "methods/distinct.py").write_text(file, encoding="utf-8")
    table = (package / "methods/table.py").read_text(encoding="utf-8")
    table = table.replace("from keepset.methods.dsir", line + "from keepset.methods.dsir").replace(
        "Dsir, ", "Dsir, Distinct, "
    )
    (package / "methods/table.py").write_text(table, encoding="utf-8")
    space: dict = {}
    exec(compile(file + test, "adding-a-method.md", "exec"), space)
    space["test_distinct_by_hand"]()
    pool = tmp_path / "pool.jsonl"
    texts = ["one two one two", "all words differ here", "alone"]
    pool.write_text("".join(json.dumps({"prompt": "?", "completion": t}) + "\n" for t in texts))
    command = [
        sys.executable,
        "-m",
        "keepset",
        "score",
        "distinct",
        "--pool",
        str(pool),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*command, "-o", "n=2"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = pq.read_table(tmp_path / "run/scores/distinct.parquet")["score"].to_pylist()
    expected = space["distinct"]([f"?\n{t}" for t in texts], n=2)
    assert scores == [None if np.isnan(x) else x for x in expected] and scores[2] is None
    refused = subprocess.run([*command, "-o", "m=2"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert refused.returncode == 2 and "no option 'm'" in refused.stderr


def test_every_method_file_is_in_the_docs():
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    files = {path.name for path in (DOCS.parent / "src" / "keepset" / "methods").glob("*.py")}
    missing = {
        name for name in files - {"__init__.py", "table.py", "gradient.py", "method.py"} if f"`{name}`" not in text
    }
    assert not missing
    named = set(re.findall(r"`([a-z0-9_]+\.py)`", text))
    assert named <= files | {path.name for path in (DOCS.parent / "src" / "keepset" / "selection").glob("*.py")}
