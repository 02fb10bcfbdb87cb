"""Rates and shared time of a cluster, by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from keepset.errors import RecipeError
from keepset.pipeline.cluster import (
    Cluster,
    Task,
    makespan,
    measured_rates,
    parse_gpus,
    peak_rates,
    shard_seconds,
)


def test_gpus_as_slurm_writes_them():
    assert parse_gpus("h100:8") == ("h100", 8) and parse_gpus("A100") == ("a100", 1)
    for wrong in ("8xh100", "h100:0", "h100:", "", "h100:8:2"):
        with pytest.raises(RecipeError, match="KIND:NUMBER"):
            parse_gpus(wrong)


def test_peak_goes_by_the_dtype():
    assert peak_rates(Cluster("h100"), "bfloat16").forward == pytest.approx(0.35 * 989e12)
    assert peak_rates(Cluster("h100", utilisation=0.5), "float32").train == pytest.approx(0.5 * 67e12)
    with pytest.raises(RecipeError, match=r"known are .*did you mean 'h100'.*--like RUN"):
        peak_rates(Cluster("h10"), "bfloat16")


def test_tasks_go_to_whoever_is_free_the_longest_first():
    tasks = [Task(s) for s in (2.0, 3.0, 4.0, 5.0)]
    assert makespan(tasks, 1) == 14 and makespan(tasks, 2) == 7 and makespan(tasks, 3) == 5
    assert makespan(tasks, 4) == makespan(tasks, 64) == 5
    assert makespan([Task(6.0, 8), Task(1.0), Task(1.0)], 2) == 7  # alone on its node, then the two side by side
    assert makespan([], 3) == 0


def test_more_workers_are_never_slower_and_never_beat_the_sum():
    rng = np.random.default_rng(0)
    for _ in range(200):
        tasks = [Task(float(s)) for s in rng.exponential(size=rng.integers(1, 20))]
        spans = [makespan(tasks, workers) for workers in range(1, 25)]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(spans))
        assert all(k * span >= sum(t.seconds for t in tasks) - 1e-9 for k, span in enumerate(spans, 1))
        assert spans[-1] == max(t.seconds for t in tasks)


def test_whole_shards_only():
    # 270,000 rows: n / 200 = 1,350 a shard, 200 shards; 8 workers take 25 rounds, 64 take 4 of which the last is part
    assert shard_seconds(270_000, 200.0, 8, None) == 25
    assert shard_seconds(270_000, 200.0, 64, None) == 4
    assert shard_seconds(270_000, 200.0, 1000, None) == 1  # a shard is one worker's
    assert shard_seconds(10_000_000, 4883.0, 64, None) == 77  # of at most 2,048 rows
    assert shard_seconds(100, 8.0, 2, 32) == 4 and shard_seconds(0, 0.0, 2, None) == 0
    for rows in (1, 31, 32, 6_400, 777_777):
        spans = [shard_seconds(rows, 1.0, workers, None) for workers in range(1, 300)]
        assert all(b <= a for a, b in itertools.pairwise(spans)) and spans[0] == pytest.approx(1)
        assert all(k * span >= 1 - 1e-12 for k, span in enumerate(spans, 1))


def test_rates_of_a_run_are_those_of_its_stages():
    entries = [
        {"stage": "train models/reference", "flops": 90.0, "seconds": 3.0},
        {"stage": "train models/warmup", "flops": 10.0, "seconds": 2.0},
        {"stage": "losses (base and reference)", "flops": 60.0, "seconds": 2.0},
        {"stage": "target gradients at checkpoint-2 (sft)", "flops": 1e9, "seconds": 1.0},
        {"stage": "score davir", "seconds": 9.0},
    ]
    rates = measured_rates(entries, "run")
    assert (rates.train, rates.forward, rates.train_seconds) == (20, 30, 0) and math.isnan(rates.backward)
    with pytest.raises(RecipeError, match="no pass and no training"):
        measured_rates(entries[-1:], "run")


def test_bytes_over_a_link():
    assert Cluster("h100", network=10).carry(10e9) == pytest.approx(8)
