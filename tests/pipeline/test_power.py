"""What held-out data can show: counted from the data, in trained runs by the measured spread, against simulation."""

from __future__ import annotations

import io
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from keepset.errors import RecipeError
from keepset.evaluate.statistics import paired_permutation
from keepset.pipeline.learn import Learner
from keepset.pipeline.power import (
    check_headline,
    held_out_counts,
    items_for,
    print_power,
    smallest_seen,
    what_can_be_seen,
)
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe


def test_counts_are_those_of_the_evaluation_itself(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["length"]), console=quiet())
    counts = held_out_counts(job, Learner(job))
    assert counts["margin.implicit_mean"] == counts["loss.preference"] == 6 and counts["loss.heldout"] == 4
    assert counts["accuracy.policy_mean.of.a"] == 3 and "gsm8k.accuracy" not in counts
    assert check_headline(job, Learner(job)) == "loss.preference"  # six pairs: too few of like length


def test_a_headline_that_is_not_measured_is_refused_before_anything_is_trained(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["length"],
                  evaluate={"pairs": [{"path": data["pairs"]}], "headline": "gsm8k.accuracy"})  # fmt: skip
    job = Job(made, console=quiet())
    with pytest.raises(RecipeError, match="evaluate.headline: 'gsm8k.accuracy' is not measured here"):
        check_headline(job, Learner(job))


def test_what_is_said_of_each_measure(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["length"]), console=quiet())
    found = {one.measure: one for one in what_can_be_seen(job, Learner(job))}
    assert next(iter(found)) == "loss.preference"
    assert found["loss.preference"].smallest == pytest.approx((2.8016 / np.sqrt(6),), abs=1e-3)
    assert found["loss.preference"].enough == (197,) and found["loss.preference"].measured is None
    assert found["accuracy.policy_mean"].smallest == () and found["accuracy.policy_mean"].enough == (157, 1570)
    console = Console(file=io.StringIO(), width=140)
    print_power([asdict(one) for one in found.values()], console)
    text = console.file.getvalue()
    assert "loss.preference (headline)" in text and "197 for 0.2 sd" in text and "157 to 1,570 for 0.05" in text


def test_a_difference_of_the_smallest_size_is_seen_in_four_of_five():
    """300 pairs of systems whose difference is just that, by the test that comparisons make."""
    rng, n, sd = np.random.default_rng(0), 40, 0.3
    size = smallest_seen("margin.implicit_mean.matched", n, sd)
    seen = [paired_permutation(rng.normal(size, sd, n), np.zeros(n), resamples=400, seed=k) < 0.05 for k in range(300)]
    assert 0.73 < np.mean(seen) < 0.86
    enough = items_for(sd, size)
    assert enough in (n, n + 1)


def test_right_or_wrong_needs_at_least_the_best_case():
    assert smallest_seen("accuracy.policy_mean", 24, 0.0) == pytest.approx(2.8016**2 / 24, abs=1e-3)
    assert smallest_seen("accuracy.policy_mean", 24, 0.7) == pytest.approx(2.8016 * 0.7 / np.sqrt(24), abs=1e-3)
    assert np.isnan(smallest_seen("gsm8k.accuracy", 12, 0.4))
    assert smallest_seen("loss.chosen", 12, 0.0) == 0.0
