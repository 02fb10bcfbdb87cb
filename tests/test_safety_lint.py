"""Calls that could run what a file contains are absent from the source: found in the syntax tree, not by grep."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "keepset").rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "jsonpickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all",
    "pandas.read_pickle", "pd.read_pickle", "builtins.eval", "builtins.exec",
}  # fmt: skip
ARRAYS = {"numpy.load", "np.load"}  # allowed with a literal allow_pickle=False
FLAGS = {"shell", "trust_remote_code", "allow_pickle"}  # never a literal True

# (file, rule) pairs that are allowed, each with its reason. HF's Trainer reads its own checkpoints when a training goes
# on; that happens inside transformers (weights_only=True), so nothing here needs an exception.
ALLOWED: dict[tuple[str, str], str] = {}


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`a.b.c` of a call's function, with imported names written out."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and rule of everything forbidden."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield node.lineno, f"import {alias.name.split('.')[0]}"
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in MODULES:
                yield node.lineno, f"import {node.module.split('.')[0]}"
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in CALLS:
            yield node.lineno, name
        if name == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
            if str(node.args[0].value).split(".")[0] in MODULES:
                yield node.lineno, f"import {node.args[0].value}"
        if name in ARRAYS:
            flag = keywords.get("allow_pickle")
            if not (isinstance(flag, ast.Constant) and flag.value is False):
                yield node.lineno, "np.load without allow_pickle=False"
        for key, value in keywords.items():
            if key in FLAGS and isinstance(value, ast.Constant) and value.value is True:
                yield node.lineno, f"{key}=True"
            if key == "weights_only" and isinstance(value, ast.Constant) and value.value is False:
                yield node.lineno, "weights_only=False"
    for node in ast.walk(tree):  # the same flags where they stand in a dict that is passed on with **
        if isinstance(node, ast.Dict):
            for k, v in zip(node.keys, node.values, strict=True):
                if isinstance(k, ast.Constant) and k.value in FLAGS and isinstance(v, ast.Constant) and v.value is True:
                    yield node.lineno, f"{k.value}=True"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT / "src")) for p in SOURCES])
def test_no_dangerous_call(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    found = [
        f"{place}:{line}: {rule}"
        for line, rule in findings(ast.parse(path.read_text(encoding="utf-8")))
        if (place, rule) not in ALLOWED
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "import shelve", "from dill import load",
        "import torch\ntorch.load('x')", "import torch as t\nt.load('x')", "from torch import load as l\nl('x')",
        "import numpy as np\nnp.load('x')", "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from numpy import load\nload('x')", "eval('1')", "exec('1')", "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)", "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "from yaml import load\nload('x')", "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})",
        "f(weights_only=False)", "__import__('pickle')", "import importlib\nimportlib.import_module('pickle')",
    ],
)  # fmt: skip
def test_the_lint_sees(code: str) -> None:
    assert list(findings(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import numpy as np\nnp.load('x', allow_pickle=False)", "import yaml\nyaml.safe_load('x')", "model.eval()",
        "from safetensors.numpy import load\nload(b'')", "import re\nre.compile('x')", "f(trust_remote_code=spec.yes)",
    ],
)  # fmt: skip
def test_the_lint_lets_pass(code: str) -> None:
    assert not list(findings(ast.parse(code)))


def tracked() -> list[Path]:
    """Text files under version control; outside a checkout the package's own."""
    try:
        told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return SOURCES
    paths = [ROOT / name for name in told.decode().split("\0") if name]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:4096]]


# Split, so that this file doesn't hold what it looks for.
MACHINE = re.compile(
    "|".join([r"(?<![\w.~])/" + r"work/(?!<)", r"(?<![\w.])/ro" + r"ot/", r"/ho" + r"me/[a-z]\w*/"])
    + r"|(?:index|extra-index)-url\s*[=:]?\s*https?:"
    + r"|https?://[^\s/]*(?:pypi|proxy|mirror|artifactory|nexus)[^\s/]*/",
    re.IGNORECASE,
)


def test_no_machine_path_or_registry_host_is_tracked() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if MACHINE.search(line) and not re.search("https://py" + r"pi\.org/(project|p)/", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    ["see /wo" + "rk/main/x", "cd /ro" + "ot/x", "open('/ho" + "me/ann/x')", "--index-url " + "https://x.y/simple",
     "https://my-" + "mirror.example/simple/"],
)  # fmt: skip
def test_machine_paths_are_seen(line: str) -> None:
    assert MACHINE.search(line)
