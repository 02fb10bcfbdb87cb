"""The demo data is what it says it is: counts, planted truth, noise, matched lengths, no leak into the evaluation."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from keepset.demo import FOLDER
from keepset.recipe import load_recipe


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


TARGET_TASKS = ("arithmetic", "support")
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
    assert (len(POOL), len(TARGET), len(EVAL)) == (119, 20, 40)
    assert len(POOL) - len(USABLE) == 2, "two rows without an answer are there for the quarantine to find"
    assert Counter(row["task"] for row in TARGET) == dict.fromkeys(TARGET_TASKS, 10)
    assert Counter(row["task"] for row in EVAL) == dict.fromkeys(TARGET_TASKS, 20)
    assert Counter(row["task"] for row in EVAL[:24]) == dict.fromkeys(TARGET_TASKS, 12), (
        "the recipe's limit is balanced"
    )
    assert len({row["task"] for row in POOL}) == 6


def test_columns() -> None:
    assert {tuple(row) for row in POOL} == {("instruction", "input", "output", "task", "quality")}
    assert {tuple(row) for row in TARGET + EVAL} == {("task", "prompt", "chosen", "rejected")}
    assert all(text.strip() == text and text for row in TARGET + EVAL for text in row.values())


def test_noise_is_real_and_in_every_task() -> None:
    quality = Counter(row["quality"] for row in USABLE)
    assert quality == {"good": 75, "wrong": 15, "truncated": 11, "duplicate": 8, "offtask": 8}
    for task in {row["task"] for row in POOL}:
        here = Counter(row["quality"] for row in USABLE if row["task"] == task)
        assert set(here) == {"good", "wrong", "truncated", "duplicate", "offtask"}
        assert 0.55 <= here["good"] / here.total() <= 0.75


def test_duplicates_have_an_original() -> None:
    good = [shingles(row["output"], 2) for row in USABLE if row["quality"] == "good"]
    for row in USABLE:
        mine = shingles(row["output"], 2)
        nearest = max(len(mine & other) / len(mine | other) for other in good if other) if mine else 0.0
        if row["quality"] == "duplicate":
            assert nearest >= 0.5 or any(row["output"] == other["output"] for other in USABLE if other is not row)
        elif row["quality"] != "good":
            assert nearest < 0.6, row  # is_odd written as is_even: a wrong answer, near the right one's text


def test_the_budget_has_room_for_the_planted_truth() -> None:
    wanted = [row for row in USABLE if row["quality"] == "good" and row["task"] in TARGET_TASKS]
    assert len(wanted) == 28
    longest = sorted(USABLE, key=lambda row: -length(row["output"]))[:17]
    found = sum(row in wanted for row in longest)
    assert found <= 9, "the longest rows must not be the planted ones: length would be the giveaway"


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
        mine = shingles(row["prompt"] + " " + row["chosen"])
        for prompt, answer in seen:
            other = shingles(prompt + " " + answer)
            assert len(mine & other) <= 0.3 * min(len(mine), len(other)) + 1, (row["prompt"], prompt)


def test_target_is_not_in_the_pool() -> None:
    assert not {row["prompt"] for row in TARGET} & {row["instruction"] for row in POOL}


def test_arithmetic_is_right_where_it_says_so() -> None:
    def answer(text: str) -> tuple[float, float]:
        """The value of the last `a op b` and the number it claims."""
        left, right = text.split("Answer:")[0].rsplit(" = ", 1)
        a, op, b = left.split()[-3:]
        value = {"x": lambda: float(a) * float(b), "/": lambda: float(a) / float(b)}.get(op)
        if value is None:
            terms = left.split()
            total, sign = float(a), {"+": 1, "-": -1}[op]
            total += sign * float(b)
            if len(terms) >= 5 and terms[-4] == "+":
                total += float(terms[-5])
        else:
            total = value()
        return total, float(right.split()[0].strip(".,"))

    good = [row["output"] for row in POOL if row["task"] == "arithmetic" and row["quality"] in ("good", "duplicate")]
    good += [row["chosen"] for row in TARGET + EVAL if row["task"] == "arithmetic"]
    assert len(good) == 46
    for text in good:
        got, claimed = answer(text)
        assert got == claimed, text
        assert float(text.split("Answer:")[1].strip(" .")) == claimed, text
    wrong = [row["output"] for row in POOL if row["task"] == "arithmetic" and row["quality"] == "wrong"]
    assert all("=" in text for text in wrong) and len(wrong) == 4


def test_recipe_loads_and_its_files_are_there() -> None:
    recipe = load_recipe(FOLDER / "recipe.yaml")
    assert recipe.pool[0].path == str(FOLDER / "pool.jsonl")
    assert recipe.target[0].path == str(FOLDER / "target.jsonl")
    assert recipe.evaluate.pairs[0].path == str(FOLDER / "eval.jsonl")
    assert [method.label for method in recipe.methods] == ["rose", "davir"]
