"""The table of metrics: what is computed, in which order it is told, and which way is better."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from keepset.pipeline.learn import item_metrics
from keepset.pipeline.metrics import HEADLINES, LOSSES, METRICS, PERFORMANCE, QUALITY, headlines, is_loss, unit_of
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
    assert LOSSES == ("loss.heldout", "loss.chosen") and not set(LOSSES) & set(PERFORMANCE)
    assert len(LOSSES) + len(PERFORMANCE) == len(METRICS)
    sources = [m.name for m in headlines(measured())][4:7]
    assert sources == ["loss.heldout", "loss.heldout.x", "loss.heldout.y"]


@pytest.mark.parametrize(
    ("name", "unit"),
    [("loss.heldout.maths", "nats a token"), ("accuracy.policy_mean.of.a", "share of pairs"), ("loss.rejected", ""),
     ("accuracy.policy_sum", ""), ("gsm8k.accuracy", "share of questions")],
)  # fmt: skip
def test_units(name, unit):
    assert unit_of(name) == unit
