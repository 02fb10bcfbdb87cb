"""DSIR against counts made one n-gram at a time, and its Gumbel draws."""

import re
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.data.buckets import NgramBuckets
from keepset.data.ids import gumbel_by_id, uniform_by_id
from keepset.methods.dsir import dsir, log_ratio

# scripts with spaces, no combining marks: the rest is in data/test_words.py
TEXT = st.text(alphabet=st.sampled_from("aAbz9_ .,\n\té²ßΣς—\x00\U0001f600"), max_size=40)


TEXTS = st.lists(TEXT, min_size=1, max_size=8)


def naive_counts(texts, n=2, n_buckets=10_000):
    """The package's n-gram counts, an n-gram at a time."""
    counts = np.zeros((len(texts), n_buckets), dtype=int)
    for row, text in zip(counts, texts, strict=True):
        tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
        for k in range(1, n + 1):
            for i in range(len(tokens) - k + 1):
                digest = sha256(" ".join(tokens[i : i + k]).encode("utf-8", "surrogatepass")).hexdigest()
                row[int(digest, 16) % n_buckets] += 1
    return counts


@settings(deadline=None)
@given(TEXTS.filter(lambda t: re.search(r"\S", "".join(t))), TEXTS.filter(lambda t: re.search(r"\S", "".join(t))))
def test_dsir_is_the_naive_one(docs, target):
    scores, _ = dsir(docs, target)
    pool, wanted = naive_counts(docs), naive_counts(target).sum(axis=0)
    p, q = wanted / wanted.sum(), pool.sum(axis=0) / pool.sum()
    np.testing.assert_allclose(scores, pool @ (np.log(p + 1e-8) - np.log(q + 1e-8)), rtol=1e-9, atol=1e-9)


def test_dsir_by_task_is_dsir_on_each_tasks_target():
    docs = ["the cat sat", "3 + 4 = 7", "a dog ran after the cat"]
    target, tasks = ["cat and dog", "1 + 2 = 3", "a cat"], ["pets", "sums", "pets"]
    scores, per_task = dsir(docs, target, tasks)
    for j, task in enumerate(["pets", "sums"]):
        alone, _ = dsir(docs, [t for t, k in zip(target, tasks, strict=True) if k == task])
        np.testing.assert_allclose(per_task[:, j], alone)
    np.testing.assert_allclose(scores, per_task.max(axis=1))


def test_dsir_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="at least one word"):
        dsir(["cat"], [" "])
    with pytest.raises(ValueError, match="at least 1"):
        dsir(["cat"], [])
    with pytest.raises(ValueError, match="'sha256' or 'fast'"):
        NgramBuckets(hash="md5")
    with pytest.raises(ValueError, match="at least one word"):
        log_ratio(np.zeros(3), np.ones(3))


def test_gumbel_top_1_draws_in_proportion_to_the_weight():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    drawn = [np.argmax(np.log(weights) + gumbel_by_id(list("abcd"), seed)) for seed in range(4000)]
    share = np.bincount(drawn, minlength=4) / 4000
    assert np.abs(share - weights).max() < 0.03  # 4 standard errors of the largest
    u = uniform_by_id([str(i) for i in range(20_000)], 0)
    assert abs(u.mean() - 0.5) < 0.01 and abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
