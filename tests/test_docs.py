"""The documentation site: every page of its menu is there, the tour is what its source makes, the build is strict."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = (ROOT / "mkdocs.yml").read_text()


def pages(menu: Any) -> list[str]:
    if isinstance(menu, list | dict):
        return [page for one in (menu.values() if isinstance(menu, dict) else menu) for page in pages(one)]
    return [menu]


def tour() -> Any:
    spec = importlib.util.spec_from_file_location("make_tour", ROOT / "docs/make_tour.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_of_the_menu_is_there_and_every_page_is_in_it() -> None:
    menu = pages(yaml.safe_load(CONFIG)["nav"])
    for page in menu:
        assert (ROOT / "docs" / page).exists() or (ROOT / page).exists(), page
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= set(menu)


def test_no_page_shows_a_picture_that_is_not_there() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name}: {picture}"


def test_the_tour_is_what_its_source_makes() -> None:
    made = tour()
    book = json.loads((ROOT / "docs/tour.ipynb").read_text())
    told = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    assert told == made.cells(), "run `make tour`"
    text, figures = made.page(book)
    assert text == (ROOT / "docs/tour.md").read_text() and figures
    assert not re.search(r"/(root|home|work|tmp)/", text), "a path of a machine"
    assert (ROOT / "docs/tour.ipynb").stat().st_size < 200_000


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "fonts.googleapis.com" not in home
