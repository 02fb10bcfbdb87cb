"""Did choosing help: the sentence and the bars, from comparisons made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from keepset.report.answer import answers, bars, prices
from keepset.runfolder.records import (
    Comparison,
    Cost,
    Entry,
    Links,
    Mean,
    MeanOverSeeds,
    ModelRow,
    Power,
    SelectionCost,
    Versus,
)

MARGIN, LOSS, SHARE = "margin.implicit_mean.matched", "loss.heldout", "accuracy.policy_mean"
Test = tuple[float, float, float, float]  # difference, low, high, Holm's p


def entry(label: str, kind: Any, value: float, test: Test | None = None, measure: str = MARGIN, **facts: Any) -> Entry:
    budget, rows, seeds = facts.get("budget", "15%"), facts.get("rows", 24), facts.get("seeds", 1)
    mean = MeanOverSeeds(value, value - 0.1, value + 0.1, 60, 0.95, 0.02 if seeds > 1 else None)
    versus = {} if test is None else {measure: Versus(test[0], test[1], test[2], 0.001, 60, (30, 0, 30), test[3])}
    return Entry(label, kind, None if kind == "base" else budget, rows, 10 * rows, seeds, {measure: mean}, versus,
                 Cost(10.0, facts.get("flops", 0.0), 5.0, 1.0))  # fmt: skip


def comparison(*entries: Entry, seen: float | None = None) -> Comparison:
    rows = []
    for e in entries:
        for seed in range(e.seeds):
            label = e.label.replace("random", f"random-{seed}") if e.kind == "random" else e.label
            means = {name: Mean(m.value, m.low, m.high, m.n, m.level) for name, m in e.metrics.items()}
            rows.append(ModelRow(label, e.kind, e.budget, e.n_rows, e.n_tokens, seed, means))
    measure = next(iter(entries[0].metrics)) if entries else MARGIN
    power = None if seen is None else {measure: Power(60, 0.1, seen)}
    none = SelectionCost(3e9, 10, 20.0, 0.75, ())
    return Comparison(tuple(rows), entries, 4e9, none, {}, Links((), ()), measure if power else "", power)


def said(made: Comparison) -> str:
    (found,) = answers(made)
    return found["sentence"].replace("\u00a0", " ")


RANDOM, BETTER, SAME, WORSE = (
    entry("random", "random", 0.5, seeds=3), (0.21, 0.12, 0.30, 0.01), (0.01, -0.05, 0.07, 1.0),
    (-0.21, -0.30, -0.12, 0.01),
)  # fmt: skip


def test_a_choice_that_is_told_apart_helped() -> None:
    made = comparison(entry("davir", "method", 0.51, SAME), entry("rose", "method", 0.71, BETTER), RANDOM)
    assert said(made) == (
        "Yes: after training on rose's 24 rows, the model prefers the right answer by 0.21 nats a token more than "
        "after training on as many random rows (95 % interval 0.12 to 0.30). davir: not told apart from random rows."
    )
    assert answers(made)[0]["help"] == "yes"


def test_an_interval_off_zero_is_not_told_apart_if_holm_does_not_say_so() -> None:
    made = comparison(entry("rose", "method", 0.71, (0.21, 0.12, 0.30, 0.06)), RANDOM, seen=0.25)
    assert answers(made)[0]["help"] == "undecided"
    assert said(made).startswith("Not that these 60 pairs can show: after training on rose's 24 rows,")
    assert said(made).endswith(" In four of five cases they would show a difference of 0.25 nats a token.")


def test_items_that_can_show_nothing_say_so() -> None:
    made = comparison(entry("rose", "method", 0.51, SAME, SHARE), entry("random", "random", 0.5, None, SHARE),
                      seen=math.nan)  # fmt: skip
    assert "in 1 more of 100 pairs" in said(made) and said(made).endswith("They are too few to show any difference.")
    random = entry("random", "random", 0.5, None, SHARE)
    equal = comparison(entry("rose", "method", 0.5, (0.0, 0.0, 0.0, 1.0), SHARE), random, seen=0.33)
    assert "on every one of them training on rose's 24 rows gives the same as training on" in said(equal)
    assert "a difference of 33 in 100." in said(equal)


def test_a_choice_that_harms_is_a_no_and_a_smaller_loss_is_better() -> None:
    made = comparison(entry("rose", "method", 0.29, WORSE), RANDOM)
    assert answers(made)[0]["help"] == "no"
    assert "by 0.21 nats a token less than" in said(made) and "(95 % interval 0.12 to 0.30)" in said(made)
    lower = comparison(entry("rose", "method", 2.0, (-0.04, -0.07, -0.01, 0.01), LOSS),
                       entry("random", "random", 2.04, None, LOSS, rows=30))  # fmt: skip
    assert "the loss on held-out rows is lower by 0.04 nats a token than after training on random rows of the" in said(
        lower
    )
    assert "(95 % interval 0.01 to 0.07)" in said(lower)
    assert bars(lower)[0]["measures"][LOSS]["versus"]["told"] == "better"


def test_length_that_does_as_well_is_named() -> None:
    made = comparison(
        entry("rose", "method", 0.71, BETTER), entry("longest", "longest", 0.8, (0.3, 0.2, 0.4, 0.01)), RANDOM
    )
    assert "But the longest rows do no worse, so length alone may be what helps." in said(made)
    less = comparison(
        entry("rose", "method", 0.71, BETTER), entry("longest", "longest", 0.6, (0.1, 0.01, 0.2, 0.01)), RANDOM
    )
    assert "longest" not in said(less)


def test_without_controls_choices_or_evaluation_nothing_is_claimed() -> None:
    alone = comparison(entry("rose", "method", 0.71), entry("base", "base", 0.4))
    assert said(alone) == (
        "Not known: no model was trained on random rows to hold it against (set controls.random_seeds). After training "
        "on rose's 24 rows it is 0.71 (0.61 to 0.81), before 0.4."
    )
    assert "interval over held-out items" in answers(alone)[0]["note"].replace("\u00a0", " ")
    assert "no method's choice was trained" in said(comparison(RANDOM))
    assert answers(None) == answers(comparison()) == bars(None) == bars(comparison()) == []


def test_every_budget_has_its_answer_and_holm_counts_all() -> None:
    made = comparison(
        entry("rose@5%", "method", 0.51, SAME, budget="5%", rows=8),
        entry("random", "random", 0.5, budget="5%", rows=8),
        entry("rose@20%", "method", 0.71, BETTER, budget="20%"), entry("random", "random", 0.5, budget="20%"),
        entry("base", "base", 0.4),
    )  # fmt: skip
    found = answers(made)
    assert [(a["budget"], a["help"]) for a in found] == [("5%", "undecided"), ("20%", "yes")]
    assert "rose's 8 rows" in found[0]["sentence"] and "correcting for 2 comparisons" in found[0]["note"]
    assert [(b["label"], b["budget"], b["control"]) for b in bars(made)] == [
        ("rose", "5%", False), ("random", "5%", True), ("rose", "20%", False), ("random", "20%", True),
        ("base", None, True),
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 3])
def test_random_drawn_once_has_no_spread(seeds: int) -> None:
    made = comparison(entry("rose", "method", 0.71, BETTER), entry("random", "random", 0.5, seeds=seeds))
    random = bars(made)[1]["measures"][MARGIN]
    assert len(random["seeds"]) == seeds and random["spread"] == (0.02 if seeds > 1 else None)
    assert ("Random was drawn once" if seeds == 1 else "the mean of 3 random draws") in answers(made)[0]["note"]


def test_prices_are_shares_of_one_training_on_the_pool() -> None:
    made = comparison(entry("rose", "method", 0.71, BETTER, flops=3e9), RANDOM)
    found = prices(made, [], ["rose"])
    assert found["methods"] == [{"label": "rose", "share": 0.75, "seconds": 10.0, "training": 5.0}]
    assert (found["share"], found["seconds"]) == (0.75, 20.0)
    logged = [{"stage": "score rose", "seconds": 2.0}, {"stage": "score rose", "seconds": 1.5}]
    assert prices(None, logged, ["rose", "bm25"])["methods"] == [
        {"label": "rose", "share": None, "seconds": 3.5, "training": None},
        {"label": "bm25", "share": None, "seconds": None, "training": None},
    ]
