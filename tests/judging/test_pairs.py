"""Pairs from scored answers."""

import math

import pytest

from keepset.judging.pairs import ScoredAnswers, best_against_worst, group_answers, shp_answers


def one(answers, scores, **options):
    rows, skipped = best_against_worst([ScoredAnswers("q", answers, scores, "t")], **options)
    assert len(rows) + len(skipped) == 1
    return (rows[0]["chosen"], rows[0]["rejected"]) if rows else skipped[0].reason


def test_best_against_worst():
    assert one(["a", "b", "c"], [2, 9, 1]) == ("b", "c")
    assert one(["a", "b"], [5, 2], min_ratio=3) == "ratio"
    assert one(["a", "b"], [6, 2], min_ratio=3) == ("a", "b")
    assert one(["a", "b"], [1, 0], min_ratio=3) == ("a", "b")
    assert one(["a", "b"], [0, -4], min_ratio=3) == "ratio"
    assert one(["a", "b"], [5, 4], min_gap=2) == "ratio"
    assert one(["a", "b"], [5, 1], min_best=6) == "ratio"
    assert one(["a", "b"], [3, 3]) == "tie"
    assert one(["a"], [3]) == "one-answer"
    assert one(["a", "b"], [3, math.nan]) == "not-finite"
    assert one(["a ", "a"], [3, 1]) == "same-text"
    with pytest.raises(ValueError):
        one(["a", "b"], [1])


def test_order_of_answers_does_not_matter():
    assert one(["a", "b", "c"], [9, 9, 1]) == one(["c", "b", "a"], [1, 9, 9]) == ("a", "c")


def test_length_matched():
    answers = ["x" * 100, "y" * 10, "z" * 95]
    assert one(answers, [9, 1, 3]) == (answers[0], answers[1])
    assert one(answers, [9, 1, 3], length_share=0.2) == (answers[0], answers[2])
    assert one(answers, [9, 1, 5], length_share=0.2, min_ratio=2) == "no-length-match"
    assert one(answers[:2], [9, 1], length_share=0.2) == "no-length-match"


def test_grouping():
    rows = [{"q": "1", "a": "x", "s": 3, "site": "c"}, {"q": "2", "a": "y", "s": 1, "site": "c"},
            {"q": "1", "a": "z", "s": "7", "site": "c"}]  # fmt: skip
    got = group_answers(rows, prompt="q", answer="a", score="s", task="site")
    assert [(g.prompt, g.answers, g.scores, g.task) for g in got] == [
        ("1", ["x", "z"], [3.0, 7.0], "c"), ("2", ["y"], [1.0], "c"),
    ]  # fmt: skip
    shp = [
        {"history": "h", "human_ref_A": "p", "human_ref_B": "q", "score_A": 9, "score_B": 2, "domain": "d"},
        {"history": "h", "human_ref_A": "q", "human_ref_B": "r", "score_A": 2, "score_B": 12, "domain": "d"},
    ]
    found = shp_answers(shp)
    assert found == [ScoredAnswers("h", ["p", "q", "r"], [9.0, 2.0, 12.0], "d")]
    rows, _ = best_against_worst(found, min_ratio=3)
    assert rows == [
        {"prompt": "h", "chosen": "r", "rejected": "q", "chosen_score": 12.0, "rejected_score": 2.0, "task": "d"}
    ]
