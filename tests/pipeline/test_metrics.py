"""The table of metrics: what is computed, in which order it is told, and which way is better."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from keepset.errors import RecipeError
from keepset.pipeline.learn import item_metrics
from keepset.pipeline.metrics import (
    HEADLINES,
    LOSSES,
    METRICS,
    PERFORMANCE,
    QUALITY,
    headline_of,
    headlines,
    is_loss,
    unit_of,
)
from keepset.runfolder.records import Items


def measured() -> dict[str, np.ndarray]:
    """The metrics of four pairs of two tasks, two rows of two sources and two questions."""
    pairs = {"chosen": np.array([-4.0, -6.0, -9.0, -2.0]), "rejected": np.array([-8.0, -3.0, -9.5, -1.0]),
             "n_chosen": np.array([2, 3, 3, 2]), "n_rejected": np.array([2, 3, 9, 1])}  # fmt: skip
    task, source = np.array([1.0, 1, 0, 0]), np.array([1.0, 0])
    rows = {"nll": np.array([3.0, 8.0]), "n_tokens": np.array([3, 4])}
    items = Items(pairs, {"a": task, "b": 1 - task}, rows, {"x": source, "y": 1 - source}, np.array([1.0, 0]))
    return item_metrics(items, items, share=0.1)


def test_every_row_is_computed_and_the_rest_has_a_known_direction():
    found = measured()
    assert {m.name for m in METRICS} <= set(found)
    for name, values in found.items():
        assert is_loss(name) == name.startswith("loss.")
        if is_loss(name):
            assert (values > 0).all()
        elif name.startswith("accuracy"):
            assert set(values) <= {0.0, 0.5, 1.0}
    np.testing.assert_array_equal(found["loss.chosen"], [2, 2, 3, 1])
    np.testing.assert_array_equal(found["loss.heldout"], [1, 2])
    np.testing.assert_array_equal(found["loss.heldout.y"], [2])
    np.testing.assert_array_equal(found["accuracy.policy_mean"], [1, 0, 0, 0.5])  # the last pair: a tie
    np.testing.assert_array_equal(found["accuracy.policy_mean.matched"], [1, 0])
    np.testing.assert_array_equal(found["accuracy.policy_mean.of.a"], [1, 0])
    assert {name for name in found if ".of." in name} == {
        f"{metric}.of.{task}" for metric in ("accuracy.policy_mean", "loss.chosen") for task in "ab"
    }


def test_the_orders_in_which_they_are_told():
    assert [m.name for m in HEADLINES] == [
        "accuracy.policy_mean.matched", "accuracy.policy_mean", "margin.implicit_mean.matched", "loss.chosen",
        "loss.heldout", "gsm8k.accuracy",
    ]  # fmt: skip
    assert [(m.name, m.sign) for m in QUALITY] == [
        ("accuracy.policy_mean.matched", 1), ("gsm8k.accuracy", 1), ("accuracy.policy_mean", 1), ("loss.chosen", -1),
        ("loss.heldout", -1),
    ]  # fmt: skip
    assert LOSSES == ("loss.heldout", "loss.chosen", "loss.preference") and not set(LOSSES) & set(PERFORMANCE)
    assert len(LOSSES) + len(PERFORMANCE) == len(METRICS)
    sources = [m.name for m in headlines(measured())][4:7]
    assert sources == ["loss.heldout", "loss.heldout.x", "loss.heldout.y"]


def test_the_preference_loss_is_dpos_own():
    """log 2 where a model is its own base; else by hand."""
    pairs = {"chosen": np.array([-4.0, -6]), "rejected": np.array([-8.0, -3]), "n_chosen": np.array([2, 3]),
             "n_rejected": np.array([2, 3])}  # fmt: skip
    base = Items(pairs)
    np.testing.assert_allclose(item_metrics(base, base, 0.1)["loss.preference"], np.log(2))
    moved = Items({**pairs, "chosen": np.array([-3.0, -6]), "rejected": np.array([-8.0, -1])})
    by_hand = [-np.log(1 / (1 + np.exp(-0.1 * 1))), -np.log(1 / (1 + np.exp(-0.1 * -2)))]
    np.testing.assert_allclose(item_metrics(moved, base, 0.1)["loss.preference"], by_hand)


def test_the_headline_follows_from_the_held_out_data_or_the_recipe():
    every = {name: 40 for name in measured()}
    assert headline_of(every) == "margin.implicit_mean.matched"
    assert headline_of({**every, "margin.implicit_mean.matched": 15}) == "loss.preference"
    assert headline_of({"loss.heldout": 3, "gsm8k.accuracy": 3}) == "loss.heldout"
    assert headline_of({"gsm8k.accuracy": 3}) == "gsm8k.accuracy" and headline_of({}) == ""
    assert headline_of(every, "accuracy.policy_mean.of.a") == "accuracy.policy_mean.of.a"
    with pytest.raises(RecipeError, match=r"evaluate.headline: 'accuracy.policy_men' is not measured here \(did you"):
        headline_of(every, "accuracy.policy_men")


def test_the_headline_stands_first_and_once():
    plain = [m.name for m in HEADLINES]
    assert [m.name for m in headlines((), "loss.chosen")] == ["loss.chosen", *(n for n in plain if n != "loss.chosen")]
    lead, *rest = headlines((), "accuracy.policy_mean.of.a")
    assert (lead.name, lead.unit) == ("accuracy.policy_mean.of.a", "share of pairs") and [m.name for m in rest] == plain
    assert headlines((), "loss.preference")[0].heading == "preference\nloss"


@pytest.mark.parametrize(
    ("name", "unit"),
    [("loss.heldout.maths", "nats a token"), ("accuracy.policy_mean.of.a", "share of pairs"), ("loss.rejected", ""),
     ("accuracy.policy_sum", ""), ("gsm8k.accuracy", "share of questions")],
)  # fmt: skip
def test_units(name, unit):
    assert unit_of(name) == unit
