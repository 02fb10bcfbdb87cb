"""The report as a file: nothing in it can turn into code, nothing asks outside, its figures are those of the scores."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from keepset.errors import KeepsetError
from keepset.report import write_report
from keepset.report.page import inline_json
from keepset.report.payload import build_payload
from keepset.report.read import read_run
from report_fixture import HOSTILE, make_run


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
