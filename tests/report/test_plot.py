"""`keepset plot`: every figure that the run has data for, the same bytes twice, and mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from keepset.errors import KeepsetError, RecipeError
from keepset.report.plot import write_plots
from report_fixture import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="pip install 'keepset[plots]'")
    return make_run(tmp_path_factory.mktemp("plots"), 120)


def test_every_figure_that_the_run_has_data_for(run: Path) -> None:
    written = write_plots(run, metrics=("accuracy.policy_mean", "loss.heldout"))
    names = {p.stem for p in written}
    assert names == {
        "scores-rose", "scores-davir", "length-rose", "length-davir", "losses-davir", "overlap",
        "comparison-accuracy.policy_mean", "comparison-loss.heldout",
    }  # fmt: skip
    assert len(written) == 2 * len(names) and {p.suffix for p in written} == {".png", ".svg"}
    assert {p.parent for p in written} == {run / "plots"} and all(p.stat().st_size > 1000 for p in written)
    scores = (run / "plots/scores-rose.svg").read_text()
    assert "cut 0." in scores and ">rows<" in scores, "text stays text"
    table = (run / "plots/comparison-accuracy.policy_mean.svg").read_text()
    assert all(f">{name}<" in table for name in ("rose", "davir", "random", "longest", "base"))
    assert "accuracy, policy mean (higher is better)" in table


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_plots(run, tmp_path / "a", formats=("svg", "pdf"), only=("losses",))
    second = write_plots(run, tmp_path / "b", formats=("svg", "pdf"), only=("losses",))
    assert [p.name for p in first] == [p.name for p in second] and len(first) == 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_several_budgets_make_a_curve(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, 40, methods=("rose", "random"))
    summary = [
        {"label": f"{label}@{budget}", "kind": kind, "budget": budget, "n_rows": n,
         "metrics": {"loss.chosen": {"value": 2 - n / 100, "low": 1.8 - n / 100, "high": 2.2 - n / 100}}}
        for label, kind in (("rose", "method"), ("random", "random")) for budget, n in (("5%", 2), ("20%", 8))
    ]  # fmt: skip
    (other / "comparison.json").write_text(json.dumps({"rows": [], "summary": summary}))
    (curve,) = write_plots(other, formats=("svg",), only=("curve",))
    text = curve.read_text()
    assert curve.name == "curve-loss.chosen.svg" and "rows trained on" in text and ">random<" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": ("gif",)}, RecipeError, "no format 'gif'; there are: png, svg, pdf"),
        ({"only": ("score",)}, RecipeError, "no plot 'score' .did you mean 'scores'"),
        ({"only": ("curve",)}, KeepsetError, "nothing to draw for curve"),
    ],
)
def test_mistakes_are_one_line(run: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        write_plots(run, **options)


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KeepsetError, match=r"pip install 'keepset\[plots\]'"):
        write_plots(make_run(tmp_path, 20))
