"""What the report is given: figures of the scores, rows that are thinned or missing, texts that moved."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from keepset.report.numbers import overlap
from keepset.report.payload import build_payload, sample_rows
from keepset.report.read import read_run
from report_fixture import LABELS, make_run, validation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"), 120, hostile=True)


def test_figures_are_those_of_the_scores(run: Path) -> None:
    payload = build_payload(read_run(run))
    for method in payload["methods"]:
        table = pq.read_table(run / "scores" / f"{method['label']}.parquet")
        score, selected = table["score"].to_numpy(), table["selected"].to_numpy()
        assert method["kept"] == selected.sum() == 12
        assert method["cut"] == pytest.approx(score[selected].min(), rel=1e-7)
        assert sum(method["histogram"]["all"]) == len(score) == 120
        assert sum(method["histogram"]["kept"]) == 12
        assert method["length"]["spearman"] == pytest.approx(
            spearmanr(score, table["n_tokens"].to_numpy())[0], abs=1e-4
        )
        for rows in method["shares"].values():
            assert sum(r["pool"] for r in rows) == 120 and sum(r["kept"] for r in rows) == 12
        names = table["source"].to_pylist()
        by_name = {r["name"]: r["kept"] for r in method["shares"]["source"]}
        assert by_name["forum"] == sum(n == "forum" and bool(k) for n, k in zip(names, selected, strict=True))


def test_overlap_is_jaccard_below_and_spearman(run: Path) -> None:
    data = read_run(run)
    found = overlap(data.columns)
    assert found is not None
    a, b = found["labels"][0], found["labels"][1]
    kept = [{i for i, k in zip(data.ids, data.columns[m]["selected"], strict=True) if k} for m in (a, b)]
    assert found["jaccard"][0][1] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]), abs=1e-4)
    expected = spearmanr(data.columns[a]["score"], data.columns[b]["score"])[0]
    assert found["spearman"][1][0] == pytest.approx(expected, abs=1e-4)


def test_heat_is_the_mean_part_of_a_group(run: Path) -> None:
    payload = build_payload(read_run(run))
    heat = next(m for m in payload["methods"] if m["label"] == "rose")["heat"]
    table = pq.read_table(run / "scores" / "rose.parquet").to_pandas()
    row = heat["groups"].index("cooking")
    expected = table[table["category"] == "cooking"]["task.sums"].mean()
    assert heat["mean"][row][heat["tasks"].index("sums")] == pytest.approx(expected, rel=1e-3)
    assert heat["groups"][:2] == ["kept rows", "all rows"]


def test_many_rows_are_thinned_but_every_kept_one_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path, 900, kept=0.05)
    data = read_run(run)
    rows = sample_rows(data, 300)
    kept = {i for c in data.columns.values() for i in data.ids[c["selected"] > 0]}
    assert len(rows) == 300
    assert kept <= set(data.ids[rows])
    payload = build_payload(data, max_rows=300)
    assert payload["summary"]["rows"] == 900 and payload["summary"]["shown"] == 300
    assert sum(payload["methods"][0]["histogram"]["all"]) == 900
    assert sample_rows(data, 10).size == len(kept)


def test_rows_are_aligned_over_methods_and_texts(run: Path) -> None:
    payload = build_payload(read_run(run))
    rows = payload["rows"]
    for name in ("rose", "davir", "random"):
        label = LABELS.get(name, name)
        table = {r["id"]: r for r in pq.read_table(run / "scores" / f"{label}.parquet").to_pylist()}
        for i, id_ in enumerate(rows["id"]):
            assert rows["methods"][label]["rank"][i] == table[id_]["rank"]
            assert rows["methods"][label]["score"][i] == pytest.approx(table[id_]["score"], rel=1e-7)
            assert rows["sources"][rows["source"][i]] == table[id_]["source"]
            assert rows["n_tokens"][i] == table[id_]["n_tokens"] == len(rows["messages"][i][-1][1].split())


def test_what_scores_are_worth_goes_into_the_page(tmp_path: Path) -> None:
    made = make_run(tmp_path, 40)
    assert build_payload(read_run(made))["truth"] is None
    (made / "validation.json").write_text(json.dumps(validation()))
    truth = build_payload(read_run(made))["truth"]
    assert truth["rows"] == 200 and truth["deciles"][0]["spearman"] == 0.94
    loss, margin, flat = truth["designs"][0]["outcomes"]
    assert (loss["ceilings"], margin["ceilings"], flat["ceilings"]) == ([0.81, 0.84], [0.71, 0.84], [None, None])
    assert loss["scores"][0] == {
        "label": "rose",
        "views": [{"value": 0.42, "low": 0.3, "high": 0.53}, {"value": 0.52, "low": 0.4, "high": 0.63}],
    }  # fmt: skip
    assert flat["scores"][0]["views"][0] == {"value": None, "low": None, "high": None}


def test_the_page_leads_with_the_comparisons_headline(tmp_path: Path) -> None:
    made = make_run(tmp_path, 40)
    comparison = json.loads((made / "comparison.json").read_text())
    assert build_payload(read_run(made))["metrics"][0]["name"] == "accuracy.policy_mean"
    comparison |= {"headline": "loss.heldout", "power": {"loss.heldout": {"n": 40, "sd": 0.1, "smallest": 0.0443}}}
    (made / "comparison.json").write_text(json.dumps(comparison))
    first, second = build_payload(read_run(made))["metrics"]
    assert first == {"name": "loss.heldout", "lower_is_better": True, "unit": "nats a token"}
    assert second["name"] == "accuracy.policy_mean"
