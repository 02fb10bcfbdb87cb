"""Histograms, shares and length buckets of the report."""

from __future__ import annotations

import numpy as np
import pytest

from keepset.report.numbers import histogram, length_bucket, shares


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
