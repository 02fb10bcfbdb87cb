"""`keepset explain`: the numbers of one row, and sentences that follow from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from keepset.errors import KeepsetError
from keepset.report.explain import explain, print_explanation
from report_fixture import make_run, validation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("explain"), 100)


def row(run: Path, label: str, rank: int) -> dict:
    table = pq.read_table(run / "scores" / f"{label}.parquet").to_pylist()
    return next(r for r in table if r["rank"] == rank)


def test_a_kept_row(run: Path) -> None:
    wanted, last, best_out = row(run, "rose", 3), row(run, "rose", 10), row(run, "rose", 11)
    facts = explain(run, wanted["id"])
    assert (facts["label"], facts["rank"], facts["of"], facts["selected"]) == ("rose", 3, 100, True)
    assert facts["score"] == wanted["score"] and facts["cut"] == last["score"]
    assert facts["gap"] == pytest.approx(wanted["score"] - last["score"])
    assert facts["percentile"] == pytest.approx(0.97)
    assert facts["verdict"].startswith("Kept by rose: rank 3 of 100")
    assert f"{best_out['score']:.4g}" in facts["change"]
    assert {t["task"]: t["value"] for t in facts["tasks"]} == {
        t: wanted[f"task.{t}"] for t in ("travel", "sums", "support")
    }
    assert facts["tasks"][0]["value"] == wanted["score"]
    assert len(facts["messages"]) == 2 and len(facts["nearest"]) == 3
    assert all(n["rank"] <= 10 and n["id"] != facts["id"] for n in facts["nearest"])
    assert [m["label"] for m in facts["methods"]] == ["rose", "davir", "random-0"]
    json.dumps(facts)


def test_what_davir_would_need(run: Path) -> None:
    wanted, cut = row(run, "davir", 40), row(run, "davir", 10)["score"]
    facts = explain(run, wanted["id"][:20], "davir")
    assert not facts["selected"] and facts["gap"] < 0
    needed = wanted["loss_ini"] * (1 - cut)
    assert (wanted["loss_ini"] - needed) / wanted["loss_ini"] == pytest.approx(cut)
    assert f"would have to be {needed:.4g}, not {wanted['loss_ref']:.4g}" in facts["change"]
    assert "budget of 40 rows" in facts["change"]


def test_a_row_left_out_by_something_other_than_its_score(tmp_path: Path) -> None:
    run = make_run(tmp_path, 50, methods=("davir",))
    path = run / "scores" / "davir.parquet"
    frame = pq.read_table(path).to_pandas()
    frame.loc[frame["rank"] == 2, "selected"] = False
    frame.to_parquet(path)
    facts = explain(run, row(run, "davir", 2)["id"])
    assert "a quota, a token budget, a repeat or an override" in facts["verdict"]


def test_a_row_without_score(tmp_path: Path) -> None:
    run = make_run(tmp_path, 50, methods=("davir",))
    path = run / "scores" / "davir.parquet"
    frame = pq.read_table(path).to_pandas().astype({"rank": "Int64"})
    frame.loc[7, ["score", "rank"]] = None
    frame["selected"] &= frame["score"].notna()
    frame["reason"] = [None] * 7 + ["nan-loss"] + [None] * 42
    frame.to_parquet(path)
    facts = explain(run, frame["id"][7])
    assert facts["score"] is None and facts["change"] is None and "nan-loss" in facts["verdict"]


def test_checkpoints_are_gathered(tmp_path: Path) -> None:
    run = make_run(tmp_path, 50, methods=("rose",))
    path = run / "scores" / "rose.parquet"
    frame = pq.read_table(path).to_pandas()
    for c in range(2):
        frame[f"ckpt{c}.norm"], frame[f"ckpt{c}.lr"] = 1.5 + c, 2e-5
    frame.to_parquet(path)
    facts = explain(run, frame["id"][0])
    assert facts["checkpoints"] == [
        {"checkpoint": 0, "norm": 1.5, "lr": 2e-5},
        {"checkpoint": 1, "norm": 2.5, "lr": 2e-5},
    ]


@pytest.mark.parametrize(
    ("row_id", "label", "message"),
    [("zzzz", None, "no scored row 'zzzz'"), ("", None, "no scored row"), (None, "roze", "did you mean 'rose'")],
)
def test_mistakes_are_one_line(run: Path, row_id: str | None, label: str | None, message: str) -> None:
    with pytest.raises(KeepsetError, match=message) as caught:
        explain(run, row(run, "rose", 1)["id"] if row_id is None else row_id, label)
    assert "\n" not in str(caught.value)


def test_an_ambiguous_beginning(run: Path) -> None:
    ids = [r["id"] for r in pq.read_table(run / "scores" / "rose.parquet").to_pylist()]
    first = next(i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1)
    with pytest.raises(KeepsetError, match="give more of it"):
        explain(run, first)


def test_the_printed_form(run: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    print_explanation(explain(run, row(run, "rose", 20)["id"]), console)
    text = console.file.getvalue()
    for part in (
        "Not kept by rose: rank 20 of 100",
        "It comes in at a score of",
        "rank in task",
        "like a kept row",
        "davir",
    ):
        assert part in text


def test_what_trainings_said_of_the_score_and_of_the_row(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40)
    gone, stays = row(run, "rose", 3)["id"], row(run, "rose", 4)["id"]
    assert explain(run, gone)["truth"] == []
    (run / "validation.json").write_text(json.dumps(validation(left_out=(gone,))))
    facts = explain(run, gone)
    assert facts["truth"] == [
        "rose orders 60 trainings (halves) by loss.target at +0.42 [+0.30, +0.53], 0 being chance; at most 0.81 can be "
        "reached.",
        "With this row the trained model is better by: loss.target +0.0021, loss.chosen -0.0003.",
    ]
    assert explain(run, stays)["truth"] == facts["truth"][:1]
    console = Console(file=io.StringIO(), width=200)
    print_explanation(facts, console)
    assert facts["truth"][1] in console.file.getvalue()
