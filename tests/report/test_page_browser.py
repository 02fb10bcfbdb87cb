"""The report in a real headless Chromium, opened from a file: what a person sees, does and is safe from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from chromium import BINARY, Browser
from keepset.report import write_report
from report_fixture import COST, HOSTILE, make_run, validation, whole_comparison

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BINARY is None, reason="no chromium: apt-get install chromium")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report"), 400, hostile=True)
    write_report(run)
    return run


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.call("Page.navigate", {"url": "about:blank"})
    browser.requests.clear(), browser.errors.clear(), browser.dialogs.clear()
    browser.open((run / "report.html").as_uri())
    browser.settle()
    return browser


def tab(page: Browser, name: str) -> None:
    page.run(f"document.getElementById('tab-{name}').click()")
    page.settle()


def say(page: Browser, element: str, value: str, event: str) -> None:
    page.run(
        f"{{ const e = document.getElementById('{element}'); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event('{event}')) }}"
    )


def choose(page: Browser, element: str, value: str) -> None:
    say(page, element, value, "change")


def find(page: Browser, text: str) -> None:
    say(page, "search", text, "input")


def count(page: Browser) -> str:
    return page.run("document.getElementById('count').textContent")


def shown(page: Browser) -> list[str]:
    return page.run("[...document.querySelectorAll('#rowtable tbody tr')].map(r => r.dataset.id)")


def nothing_happened(page: Browser) -> None:
    assert page.errors == []
    assert page.dialogs == []
    assert [r for r in page.requests if not r.startswith(("file:", "data:,"))] == []
    assert len([r for r in page.requests if r.startswith("file:")]) <= 1
    assert page.run("typeof window.hit") == "undefined"


def test_every_part_opens_without_errors_and_requests(page: Browser) -> None:
    for name in ("rows", "quarantine", "reproduce", "overview"):
        tab(page, name)
        assert page.run(f"document.getElementById('panel-{name}').innerText.length") > 100
        assert page.run("document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
    assert page.run("document.querySelectorAll('#panel-overview svg').length") >= 6
    nothing_happened(page)


def test_hostile_rows_do_nothing_and_are_shown_as_text(page: Browser) -> None:
    tab(page, "rows")
    for i in range(len(HOSTILE)):
        find(page, f"question {i}:" if i >= len(HOSTILE) else f" {i}")
        page.run(f"document.querySelectorAll('#rowtable .open')[{i % 3}].click()")
    find(page, "<img src=x")
    assert len(shown(page)) >= 2
    page.run("document.querySelector('#rowtable .open').click()")
    assert "<img src=x" in page.run("document.querySelector('#drawer .messages').textContent")
    assert (
        page.run(
            "document.querySelectorAll('#drawer img, #rowtable img, #drawer script, main script, main iframe').length"
        )
        == 0
    )
    find(page, "gnp.exe")
    page.run("document.querySelector('#rowtable .open').click()")
    assert "⟨U+202E⟩" in page.run("document.querySelector('#drawer .messages').textContent")
    for name in ("quarantine", "reproduce", "overview"):
        tab(page, name)
    page.settle()
    nothing_happened(page)
    assert page.run("document.title") == "spring-pool · keepset report"


def test_the_policy_is_enforced(page: Browser) -> None:
    page.run(
        "{ const s = document.createElement('style'); s.textContent = 'h1{color:rgb(255,0,0)}';"
        " document.head.append(s) }"
    )
    assert page.run("getComputedStyle(document.querySelector('h1')).color") != "rgb(255, 0, 0)"
    assert (
        page.run("(() => { try { document.body.innerHTML = '<b>x</b>'; return 'set' } catch (e) { return e.name } })()")
        == "TypeError"
    )


@pytest.mark.parametrize("label", ["rose", "davir", "random-0"])
def test_sort_and_filter_give_pyarrow_s_figures(page: Browser, run: Path, label: str) -> None:
    table = pq.read_table(run / "scores" / f"{label}.parquet")
    tab(page, "rows")
    choose(page, "method", label)
    by_rank = table.sort_by("rank")
    assert shown(page) == by_rank["id"].to_pylist()[:50]
    choose(page, "source", "=web")
    web = by_rank.filter(pc.equal(by_rank["source"], "web"))
    assert shown(page) == web["id"].to_pylist()[:50]
    tokens, kept, mean = pc.sum(web["n_tokens"]).as_py(), pc.sum(web["selected"]).as_py(), pc.mean(web["score"]).as_py()
    assert (
        count(page).replace("−", "-")
        == f"{web.num_rows} of 400 rows · {kept} kept · {tokens:,} tokens · mean score {mean:.4f}"
    )
    choose(page, "kept", "kept")
    page.run("document.querySelector('[data-sort=n_tokens]').click()")
    both = web.filter(web["selected"]).sort_by([("n_tokens", "descending"), ("id", "ascending")])
    assert shown(page) == both["id"].to_pylist()[:50]
    assert page.run("document.querySelector('[aria-sort=descending]').textContent") == "Tokens"
    page.run("document.querySelector('[data-sort=n_tokens]').click()")
    assert shown(page) == both.sort_by([("n_tokens", "ascending"), ("id", "ascending")])["id"].to_pylist()[:50]


def test_search_and_pages(page: Browser) -> None:
    tab(page, "rows")
    find(page, "Question 1")
    expected = 1 + 10 + 100 - 11  # 1, 10-19, 100-199 less the hostile rows' own prompts (1, 10-19)
    assert count(page).startswith(f"{expected} of 400")
    first = shown(page)
    page.run("document.querySelectorAll('.pager button')[1].click()")
    assert len(shown(page)) == 50 and not set(first) & set(shown(page))
    find(page, "no such text anywhere")
    assert shown(page) == [] and count(page).startswith("0 of 400")


def test_the_drawer_shows_the_right_row_and_the_keyboard_reaches_it(page: Browser, run: Path) -> None:
    table = pq.read_table(run / "scores" / "rose.parquet").sort_by("rank")
    tab(page, "rows")
    page.run("document.querySelectorAll('#rowtable .open')[2].focus()")
    page.press("Enter")
    page.settle()
    third = table.slice(2, 1).to_pylist()[0]
    assert page.run("document.getElementById('drawer').open")
    assert third["id"] in page.run("document.getElementById('drawer-title').textContent")
    assert "Kept by rose: rank 3 of 400" in page.run("document.getElementById('verdict').textContent")
    parts = page.run("document.querySelector('#drawer .parts').innerText").replace("−", "-")
    for task in ("travel", "sums", "support"):
        assert f"{third['task.' + task]:.4f}" in parts
    page.run("[...document.querySelectorAll('.drawer-acts > button')][1].click()")
    assert table["id"][3].as_py() in page.run("document.getElementById('drawer-title').textContent")
    page.press("Escape")
    page.settle()
    assert not page.run("document.getElementById('drawer').open")
    choose(page, "kept", "not kept")
    page.run("document.querySelector('#rowtable tbody tr').click()")
    best_dropped = table.slice(40, 1).to_pylist()[0]
    gap = table["score"][39].as_py() - best_dropped["score"]
    verdict = page.run("document.getElementById('verdict').textContent")
    assert verdict.startswith("Not kept by rose: rank 41 of 400; it would need")
    assert float(verdict.split()[-2].replace("−", "-").replace("e-", "e-")) == pytest.approx(gap, rel=0.1, abs=1e-4)
    change = page.run("document.getElementById('change').textContent")
    assert "or at a budget of 41 rows. Its best task, " in change
    page.press("Escape")
    choose(page, "method", "davir")
    page.run("document.querySelector('#rowtable tbody tr').click()")
    davir = pq.read_table(run / "scores" / "davir.parquet").sort_by("rank")
    row, cut = davir.slice(40, 1).to_pylist()[0], davir["score"][39].as_py()
    change = page.run("document.getElementById('change').textContent")
    needed = float(change.split("would have to be ")[1].split(",")[0])
    assert needed == pytest.approx(row["loss_ini"] * (1 - cut), rel=1e-2)


def test_the_drawer_shows_what_the_models_said(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, 60, methods=("rose", "davir"))
    tables = {m: pq.read_table(run / "scores" / f"{m}.parquet").sort_by("rank") for m in ("rose", "davir")}
    kept = {m: table["id"][0].as_py() for m, table in tables.items()}
    pull = {"task": "travel", "prompt": HOSTILE[2], "chosen": "by train", "rejected": HOSTILE[1], "value": 0.25,
            "checkpoints": [0.2, 0.3]}  # fmt: skip
    tokens = [["the", 2.0, 0.5], [HOSTILE[0], 1.0, 1.4], ["end", 0.5, 0.5]]
    entry = {"pairs": [pull, {**pull, "value": -0.5}], "left_out": 7, "without": "Without it ..."}
    told = {"rose": {kept["rose"]: entry}, "davir": {kept["davir"]: {"tokens": tokens}}}
    (run / "why.json").write_text(json.dumps(told))
    browser.errors.clear(), browser.requests.clear()
    browser.call("Page.navigate", {"url": "about:blank"})
    browser.open(write_report(run).as_uri() + "#rows")
    browser.settle()
    browser.run("document.querySelector('#rowtable tbody tr').click()")
    text = browser.run("document.querySelector('.why').innerText").replace("−", "-")
    assert "+0.250" in text and "-0.500" in text and "<img src=x" in text and "by checkpoint: 0.200, 0.300" in text
    assert "7 between them are left out. Without it ..." in text
    browser.press("Escape")
    choose(browser, "method", "davir")
    browser.run("document.querySelector('#rowtable tbody tr').click()")
    kinds = browser.run("[...document.querySelectorAll('.tokens span')].map(e => [e.className, e.textContent])")
    assert kinds == [["fell", "the"], ["rose", HOSTILE[0]], ["fell", "end"]]
    note = browser.run("document.querySelector('.why .note').textContent")
    assert note.startswith("3.500 → 2.400 nats in all. Fell most: “the” 2.00 → 0.50.")
    colour = "getComputedStyle(document.querySelectorAll('.tokens span')[{}]).backgroundColor"
    assert len({browser.run(colour.format(i)) for i in range(3)}) == 3
    nothing_happened(browser)


def test_several_budgets_are_shown_one_at_a_time_and_as_a_curve(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, 60, methods=("rose", "random"))
    rows, summary = [], []
    for budget, k in (("5%", 3), ("20%", 12)):
        for label, kind, value in ((f"rose@{budget}", "method", 0.6 + k / 100), (f"random-0@{budget}", "random", 0.5)):
            mean = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40, "level": 0.95}
            size = {"label": label, "kind": kind, "budget": budget, "n_rows": k, "n_tokens": 9}
            rows.append({**size, "seed": 0, "metrics": {"accuracy.policy_mean": mean}})
            summary.append({**size, "seeds": 1, "metrics": {"accuracy.policy_mean": {**mean, "spread": None}},
                            "vs_random": {}, "cost": COST})  # fmt: skip
    (run / "comparison.json").write_text(json.dumps(whole_comparison(rows, summary)))
    browser.errors.clear()
    browser.open(write_report(run).as_uri())
    browser.settle()
    drawn = "document.querySelector('#panel-overview figure svg').getAttribute('aria-label')"
    assert browser.run(drawn) == "accuracy, policy mean: rose 0.630; random 0.500"
    browser.run("{ const e = document.querySelector('select'); e.value = '20%'; e.dispatchEvent(new Event('change')) }")
    browser.settle()
    assert browser.run(drawn) == "accuracy, policy mean: rose 0.720; random 0.500"
    assert "After training on rose's 12 rows" in browser.run("document.querySelector('.answer').textContent")
    curve = "document.querySelectorAll('#panel-overview figure svg')[1].getAttribute('aria-label')"
    assert "rose 3: 0.630, 12: 0.720" in browser.run(curve)
    assert browser.errors == []


def test_the_first_screen_asks_its_four_questions_in_order_and_answers_the_first_at_once(page: Browser) -> None:
    asked = page.run("[...document.querySelectorAll('#panel-overview h2')].slice(0, 4).map((e) => e.textContent)")
    assert asked == ["Did choosing help?", "What was kept?", "What did it cost?", "What to look at next"]
    assert page.run("document.querySelector('.answer').getBoundingClientRect().bottom") < 400
    assert page.run("document.querySelector('.answer').textContent").startswith("Yes: after training on rose's 40 rows")
    drawn = page.run("document.querySelector('#panel-overview figure svg').getAttribute('aria-label')")
    assert "rose 0.74, +0.13 to random (+0.02 to +0.24), better" in drawn and "longest 0.66; random 0.61" in drawn
    assert page.run("document.querySelectorAll('#panel-overview .band').length") == 1
    assert page.run("document.querySelectorAll('.findings > li:not(details li)').length") <= 3


def test_rows_to_read_stand_side_by_side_and_lead_to_the_others(page: Browser, run: Path) -> None:
    table = pq.read_table(run / "scores" / "rose.parquet").sort_by("rank")
    cards = page.run("[...document.querySelectorAll('.card small')].map((e) => e.textContent)")
    assert [card.split(" · ")[0] for card in cards] == [f"rank {k}" for k in (1, 2, 3, 41, 42, 400)]
    page.run("document.querySelector('.left-side .card').click()")
    assert table["id"][40].as_py() in page.run("document.getElementById('drawer-title').textContent")
    page.press("Escape")
    page.run("document.querySelector('.left-side > a').click()")
    page.settle()
    assert page.run("!document.getElementById('panel-rows').hidden") and count(page).startswith("360 of 400")
    assert page.run("document.getElementById('kept').value") == "not kept"
    tab(page, "overview")
    page.run("document.querySelector('.kept-side > a').click()")
    page.settle()
    assert count(page).startswith("40 of 400") and shown(page) == table["id"].to_pylist()[:40]
    assert page.errors == []


def test_a_remedy_s_command_is_copied(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, 60)
    finding = {"name": "duplicates", "level": "warning", "method": "rose", "figure": 6, "text": "6 rows", "advice": "x"}
    (run / "findings.json").write_text(json.dumps([finding]))
    browser.call("Page.navigate", {"url": "about:blank"})
    browser.errors.clear()
    browser.open(write_report(run).as_uri())
    browser.settle()
    command = browser.run("document.querySelector('.command code').textContent").strip()
    assert command == f"keepset select rose --run_dir {run} --dedup exact"
    browser.run("document.querySelector('.copy').click()")
    browser.settle()
    assert browser.run("document.querySelector('.copy').textContent") in ("Copied", "Selected")
    assert browser.errors == []


def test_what_scores_are_worth_is_drawn_best_first_between_chance_and_the_ceiling(
    browser: Browser, tmp_path: Path
) -> None:
    run = make_run(tmp_path, 60)
    (run / "validation.json").write_text(json.dumps(validation()))
    browser.errors.clear()
    browser.open(write_report(run).as_uri())
    browser.settle()
    section = "document.querySelector('[aria-labelledby=h-truth]')"
    assert browser.run(f"{section}.querySelector('figure svg').getAttribute('aria-label')") == (
        "the target's loss: rose 0.42 (0.30 to 0.53); davir 0.13 (0.01 to 0.24); random-0 −0.02 (−0.14 to 0.09); "
        "the most that can be reached 0.81"
    )
    names = f"[...{section}.querySelectorAll('svg .cut-name')].map((e) => e.textContent).join()"
    assert browser.run(names) == "a random score,the most that can be reached"
    assert "60 models were trained, each on a random half of 200 rows" in browser.run(f"{section}.textContent")
    browser.run(f"{{ const e = {section}.querySelector('select'); e.selectedIndex = 2; "
                "e.dispatchEvent(new Event('change')) }")  # fmt: skip
    browser.settle()
    assert "is the same for all models: it orders nothing" in browser.run(f"{section}.textContent")
    assert browser.errors == []


def test_tabs_by_arrow_keys(page: Browser) -> None:
    page.run("document.getElementById('tab-overview').focus()")
    page.press("ArrowRight")
    page.settle()
    assert page.run("document.activeElement.id") == "tab-rows"
    assert page.run("!document.getElementById('panel-rows').hidden")
    page.press("ArrowLeft")
    page.settle()
    assert page.run("document.activeElement.id") == "tab-overview"


def test_marks_become_an_overrides_file(page: Browser, tmp_path: Path) -> None:
    page.call("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}, session=False)
    tab(page, "rows")
    ids = shown(page)
    page.run("document.querySelectorAll('#rowtable .mark .drop')[0].click()")
    page.run("document.querySelectorAll('#rowtable .mark .keep')[1].click()")
    page.run("document.querySelectorAll('#rowtable .mark .keep')[2].click()")
    page.run("document.querySelectorAll('#rowtable .mark .keep')[2].click()")  # twice: taken back
    assert page.run("document.getElementById('download').textContent") == "Download 2 overrides"
    page.run("document.getElementById('download').click()")
    until = time.monotonic() + 20
    while not (tmp_path / "overrides.json").exists() and time.monotonic() < until:
        page.settle()
    assert json.loads((tmp_path / "overrides.json").read_text()) == {"keep": [ids[1]], "drop": [ids[0]]}
    page.run("document.querySelectorAll('#rowtable .mark .drop')[0].click()")
    page.run("document.querySelectorAll('#rowtable .mark .keep')[1].click()")
    assert page.run("document.getElementById('download').hidden")
    assert page.errors == []


def test_names_for_screen_readers(page: Browser) -> None:
    tab(page, "rows")
    nameless = page.run(
        "[...document.querySelectorAll('button, select, input, svg, [role=region]')]"
        ".filter(e => !e.hidden && !(e.getAttribute('aria-label')"
        " || e.textContent.trim() || e.labels?.length || e.placeholder)).map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    assert page.run(
        "[...document.querySelectorAll('svg')].every(e => e.getAttribute('role') === 'img'"
        " && e.getAttribute('aria-label').length > 20)"
    )


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_width_scrolls_sideways(browser: Browser, run: Path, width: int) -> None:
    browser.call("Page.navigate", {"url": "about:blank"})
    browser.open((run / "report.html").as_uri(), width=width)
    for name in ("overview", "rows", "quarantine", "reproduce"):
        tab(browser, name)
        assert browser.run("document.documentElement.scrollWidth") <= width, name


def test_it_prints_every_part_but_the_table_of_rows(page: Browser, run: Path) -> None:
    data = page.call("Page.printToPDF", {"printBackground": True})["data"]
    assert len(data) > 20_000
    page.call("Emulation.setEmulatedMedia", {"media": "print"})
    visible = page.run(
        "['overview','rows','quarantine','reproduce']"
        ".filter(n => getComputedStyle(document.getElementById('panel-' + n)).display !== 'none')"
    )
    page.call("Emulation.setEmulatedMedia", {"media": ""})
    assert visible == ["overview", "quarantine", "reproduce"]
    assert page.run("document.getElementById('panel-reproduce').textContent.includes('recipe.yaml')")


def test_twenty_thousand_rows_open_and_filter_in_time(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, 20_000)
    browser.call("Page.navigate", {"url": "about:blank"})
    opened = browser.open(write_report(run).as_uri() + "#rows")
    browser.settle()
    assert count(browser).startswith("20,000 of 20,000")
    assert opened <= 3.0
    spent = browser.run(
        "(() => { const e = document.getElementById('search'), out = [];"
        " for (const t of ['a', 'river', 'harbours before', 'x9']) {"
        " e.value = t; const at = performance.now(); e.dispatchEvent(new Event('input')); document.body.offsetHeight;"
        " out.push(performance.now() - at); } return out })()"
    )
    print(f"20k rows: open {opened:.2f} s, filters {[round(s) for s in spent]} ms")
    assert max(spent[1:]) <= 200, spent
    assert spent[0] <= 400, "the first search also builds its index"
    assert browser.errors == []
