"""The demo data is what it says it is: counts, planted truth, noise, matched lengths, no leak into the evaluation."""

from __future__ import annotations

import calendar
import json
import re
from collections import Counter
from datetime import date, datetime

import pytest

from keepset.demo import FOLDER
from keepset.recipe import load_recipe


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


TARGET_TASKS = ("dates", "support")
POOL, TARGET, EVAL = rows("pool.jsonl"), rows("target.jsonl"), rows("eval.jsonl")
USABLE = [row for row in POOL if row["output"]]


def words(text: str) -> list[str]:
    return text.lower().split()


def length(text: str) -> int:
    """Token count of a tokenizer that splits numbers into digits, as SmolLM2's does, near enough."""
    return sum(len(word) if word.isdigit() else 1 for word in words(text))


def shingles(text: str, n: int = 4) -> set[tuple[str, ...]]:
    split = words(text)
    return {tuple(split[i : i + n]) for i in range(len(split) - n + 1)}


def test_counts() -> None:
    assert (len(POOL), len(TARGET), len(EVAL)) == (164, 20, 60)
    assert len(POOL) - len(USABLE) == 2, "two rows without an answer are there for the quarantine to find"
    assert Counter(row["task"] for row in TARGET) == dict.fromkeys(TARGET_TASKS, 10)
    assert Counter(row["task"] for row in EVAL) == dict.fromkeys(TARGET_TASKS, 30)
    assert len({row["task"] for row in POOL}) == 7


def test_columns() -> None:
    assert {tuple(row) for row in POOL} == {("instruction", "input", "output", "task", "quality")}
    assert {tuple(row) for row in TARGET + EVAL} == {("task", "prompt", "chosen", "rejected")}
    assert all(text.strip() == text and text for row in TARGET + EVAL for text in row.values())


def test_the_target_s_skill_is_rare_and_mistakes_are_common() -> None:
    quality = {task: Counter(row["quality"] for row in USABLE if row["task"] == task) for task in TARGET_TASKS}
    assert quality["dates"] == {"good": 12, "wrong": 24}
    assert quality["support"] == {"good": 14, "wrong": 24, "truncated": 2, "offtask": 2}
    other = Counter(row["quality"] for row in USABLE if row["task"] not in TARGET_TASKS)
    assert other == {"good": 61, "wrong": 8, "truncated": 7, "offtask": 4, "duplicate": 4}


def test_duplicates_have_an_original() -> None:
    good = [shingles(row["output"], 2) for row in USABLE if row["quality"] == "good"]
    for row in USABLE:
        mine = shingles(row["output"], 2)
        nearest = max(len(mine & other) / len(mine | other) for other in good if other) if mine else 0.0
        if row["quality"] == "duplicate":
            assert nearest >= 0.5 or any(row["output"] == other["output"] for other in USABLE if other is not row)
        elif row["quality"] != "good":
            assert nearest < 0.6, row  # is_odd written as is_even: a wrong answer, near the right one's text


def test_the_budget_is_the_planted_truth() -> None:
    wanted = [row for row in USABLE if row["quality"] == "good" and row["task"] in TARGET_TASKS]
    assert len(wanted) == 26 and int(0.15 * len(USABLE)) == 24
    for key in (lambda row: -length(row["output"]), lambda row: length(row["output"])):
        found = sum(row in wanted for row in sorted(USABLE, key=key)[:24])
        assert found <= 10, "neither the longest nor the shortest rows may be the planted ones"


@pytest.mark.parametrize("pairs", [TARGET, EVAL], ids=["target", "eval"])
def test_lengths_are_matched(pairs: list[dict[str, str]]) -> None:
    for task in TARGET_TASKS:
        chosen = [length(row["chosen"]) for row in pairs if row["task"] == task]
        rejected = [length(row["rejected"]) for row in pairs if row["task"] == task]
        assert abs(sum(chosen) / sum(rejected) - 1) <= 0.2
    near = [
        abs(len(row["chosen"]) - len(row["rejected"])) <= 0.2 * max(len(row["chosen"]), len(row["rejected"]))
        for row in pairs
    ]
    assert sum(near) >= 0.5 * len(pairs)


def test_evaluation_is_held_out() -> None:
    seen = [(row["instruction"], row["output"] or "") for row in POOL] + [(r["prompt"], r["chosen"]) for r in TARGET]
    prompts = {prompt for prompt, _ in seen}
    for row in EVAL:
        assert row["prompt"] not in prompts
        if row["task"] == "dates":
            continue  # four ways of asking, which all stand in the pool; no date is asked for twice (below)
        mine = shingles(row["prompt"] + " " + row["chosen"])
        for prompt, answer in seen:
            other = shingles(prompt + " " + answer)
            assert len(mine & other) <= 0.3 * min(len(mine), len(other)) + 1, (row["prompt"], prompt)


def test_target_is_not_in_the_pool() -> None:
    assert not {row["prompt"] for row in TARGET} & {row["instruction"] for row in POOL}


def as_date(text: str, order: str) -> date:
    """The date of an answer."""
    return datetime.strptime(text.removeprefix("The date is ").removesuffix("."), order).date()


def asked(question: str) -> date:
    """The date that a question is about."""
    day, year = (int(n) for n in sorted(re.findall(r"\d+", question), key=int))
    month = next(k for k, name in enumerate(calendar.month_name) if name and name in question)
    return date(year, month, day)


def test_dates_are_right_where_they_say_so() -> None:
    right, swapped = "%Y-%m-%d", "%Y-%d-%m"
    rows = [(row["instruction"], row["output"], row["quality"] == "good") for row in POOL if row["task"] == "dates"]
    for row in TARGET + EVAL:
        if row["task"] == "dates":
            rows += [(row["prompt"], row["chosen"], True), (row["prompt"], row["rejected"], False)]
    assert len(rows) == 36 + 2 * 40
    for question, answer, good in rows:
        assert as_date(answer, right if good else swapped) == asked(question)
        assert good or as_date(answer, right) != asked(question)
    assert len({asked(question) for question, _, _ in rows}) == 76, "no date is asked for twice"


def test_recipe_loads_and_its_files_are_there() -> None:
    recipe = load_recipe(FOLDER / "recipe.yaml")
    assert recipe.pool[0].path == str(FOLDER / "pool.jsonl")
    assert recipe.target[0].path == str(FOLDER / "target.jsonl")
    assert recipe.evaluate.pairs[0].path == str(FOLDER / "eval.jsonl")
    assert [method.label for method in recipe.methods] == ["rose", "less", "davir", "bm25"]
