"""The manifest: versions of what is installed, and a checksum for every file that a run would make again."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import numpy as np

from keepset import __version__
from keepset.pipeline.manifest import PACKAGES, versions


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["python"] == platform.python_version() and found["keepset"] == __version__
    assert found["numpy"] == np.__version__ and set(found) <= {"python", "keepset", *PACKAGES}


def test_files_have_their_checksums_and_none_holds_seconds(small_run: Path):
    manifest = json.loads((small_run / "manifest.json").read_text())
    files = manifest["files"]
    assert files == {name: hashlib.sha256((small_run / name).read_bytes()).hexdigest() for name in files}
    patterns = ("scores/*.parquet", "subsets/*", "models/*/*.safetensors", "models/*/*/*.safetensors",
                "evaluation/*/*.safetensors")  # fmt: skip
    made = {str(path.relative_to(small_run)) for pattern in patterns for path in small_run.glob(pattern)}
    assert set(files) == made
    assert manifest["recipe"]["budget"] and "run_dir" not in manifest["recipe"]
    assert manifest["subsets"] == json.loads((small_run / "subsets.json").read_text())
