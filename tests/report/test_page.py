"""The report as a file: nothing in it can turn into code, nothing asks outside, its figures are those of the scores."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from keepset.errors import KeepsetError
from keepset.report import write_report
from keepset.report.numbers import histogram, length_bucket, overlap, shares
from keepset.report.page import inline_json
from keepset.report.payload import build_payload, sample_rows
from keepset.report.read import read_run
from report_fixture import HOSTILE, LABELS, make_run


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text inside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.raw.append((self.tags[-1][0], data))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"), 120, hostile=True)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_hostile_rows_leave_the_page_s_elements_as_they_are(page: str, tmp_path: Path) -> None:
    plain = write_report(make_run(tmp_path, 120, hostile=False)).read_text(encoding="utf-8")
    assert Elements(page).tags[:3] == Elements(plain).tags[:3]
    assert [t for t, _ in Elements(page).tags] == [t for t, _ in Elements(plain).tags]
    texts = [m[1] for row in data_of(page)["rows"]["messages"] for m in row]
    for payload in HOSTILE:
        assert any(payload in text for text in texts), "the payload must have arrived, and as text"


def test_the_data_block_holds_no_character_that_html_or_js_could_read(page: str) -> None:
    block = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", block)
    assert len(re.findall("</script", page)) == 2


@pytest.mark.parametrize("text", ["</script><b>", "<!--", "a&b", "\u2028\u2029", "\ud83d", "\u202e", "\x00\x1f"])
def test_inline_json_round_trips(text: str) -> None:
    out = inline_json({"k": [text]})
    assert json.loads(out) == {"k": [text]}
    out.encode("utf-8")
    assert not re.search("[<>&\u2028\u2029]", out)


def test_inline_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError):
        inline_json([float("nan")])


def test_the_policy_allows_its_own_script_and_style_by_hash_and_nothing_else(page: str) -> None:
    found = Elements(page)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy
    assert "http" not in policy and "*" not in policy
    scripts = [text for tag, text in found.raw if tag == "script" and not text.startswith("{")]
    styles = [text for tag, text in found.raw if tag == "style"]
    for name, texts in (("script-src", scripts), ("style-src", styles)):
        hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() + "'" for t in texts]
        assert rules[name].split() == hashes and len(hashes) == 1


def test_nothing_in_the_page_points_outside(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        assert not {"style", "onclick", "onload", "onerror"} & set(attributes), (tag, attributes)
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    code = "".join(text for tag, text in Elements(page).raw if tag == "script" and not text.startswith("{"))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "XMLHttpRequest",
        "import(",
    ):
        assert word not in code
    style = next(text for tag, text in Elements(page).raw if tag == "style")
    assert "url(" not in style and "@import" not in style


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


def test_missing_pieces_leave_their_section_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40, methods=("davir",))
    for name in ("comparison.json", "findings.json", "manifest.json", "quarantine.jsonl", "costs.jsonl", "recipe.yaml"):
        (run / name).unlink()
    data = data_of(write_report(run, tmp_path / "out.html").read_text(encoding="utf-8"))
    assert data["comparison"] == data["findings"] == data["quarantine"] == []
    assert data["overlap"] is None
    assert data["summary"]["without_text"] == 40


def test_texts_come_from_the_subset_when_the_pool_moved(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40, methods=("davir",))
    (run / "subsets").mkdir()
    pool = (tmp_path / "pool.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "subsets" / "davir.jsonl").write_text("".join(pool[:5]), encoding="utf-8")
    (tmp_path / "pool.jsonl").unlink()
    assert build_payload(read_run(run))["summary"]["without_text"] == 35


def test_unscored_rows_are_shown_without_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40, methods=("davir",))
    path = run / "scores" / "davir.parquet"
    frame = pq.read_table(path).to_pandas().astype({"rank": "Int64"})
    frame.loc[3, ["score", "rank"]] = None
    frame["reason"] = [None] * 3 + ["nan-loss"] + [None] * 36
    frame.to_parquet(path)
    payload = build_payload(read_run(run))
    at = payload["rows"]["id"].index(frame["id"][3])
    assert payload["rows"]["methods"]["davir"]["score"][at] is None
    assert payload["methods"][0]["reasons"] == {frame["id"][3]: "nan-loss"}
    assert payload["methods"][0]["scored"] == 39


def test_a_folder_without_scores_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(KeepsetError, match="no scores here yet"):
        write_report(tmp_path)


def test_histogram_counts_far_outliers_in_the_outer_bins() -> None:
    score = np.concatenate([np.random.default_rng(0).normal(size=2000), [1e6, -1e6]])
    selected = np.zeros(2002)
    selected[-2] = 1
    found = histogram(score, selected)
    assert found is not None
    assert sum(found["all"]) == 2002 and found["kept"][-1] == 1
    assert found["clipped"] >= 2 and found["edges"][-1] < 100


def test_histogram_of_one_value() -> None:
    found = histogram(np.full(5, 2.0), np.ones(5))
    assert found is not None and sum(found["all"]) == 5
    assert histogram(np.array([1.0, np.nan]), np.zeros(2)) is None


def test_shares_sum_the_tail_up() -> None:
    names = np.array([f"s{i}" for i in range(30) for _ in range(30 - i)], dtype=object)
    selected = (np.arange(len(names)) % 3 == 0).astype(float)
    found = shares(names, selected)
    assert len(found) == 12 and found[-1]["name"] == "other (19)"
    assert sum(r["pool"] for r in found) == len(names)
    assert sum(r["kept"] for r in found) == selected.sum()


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (0, "0–15"),
        (15, "0–15"),
        (16, "16–31"),
        (31, "16–31"),
        (32, "32–63"),
        (1024, "1024–2047"),
        (float("nan"), "unknown"),
    ],
)
def test_length_buckets(n: float, name: str) -> None:
    assert length_bucket(n) == name
