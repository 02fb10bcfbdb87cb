"""Words, hashes, BM25 and DSIR against slow and obvious twins."""

import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.data.buckets import NgramBuckets, Sha256Buckets, Twice
from keepset.data.ids import gumbel_by_id, uniform_by_id
from keepset.data.words import chunks, hash_tokens, ngram_vectors, ngrams, segment_sums, words
from keepset.methods.bm25 import bm25
from keepset.methods.dsir import dsir, log_ratio
from keepset.methods.rds import rds
from tolerance import tolerance

SUM = tolerance(64)  # bm25s and the vectors are float32; a text of these tests has fewer words

# scripts with spaces, no combining marks: the rest is in data/test_words.py
TEXT = st.text(alphabet=st.sampled_from("aAbz9_ .,\n\té²ßΣς—\x00\U0001f600"), max_size=40)
TEXTS = st.lists(TEXT, min_size=1, max_size=8)
WORDY = st.lists(st.lists(st.sampled_from("the cat dog sat 42 ran on".split()), max_size=12).map(" ".join), min_size=1)


@given(TEXTS, st.booleans())
def test_hashed_tokens_are_the_regular_expressions_tokens(texts, punctuation):
    pattern = r"\w+|[^\w\s]+" if punctuation else r"\w+"
    hashed = hash_tokens(texts, punctuation=punctuation)
    expected = [re.findall(pattern, text.lower()) for text in texts]
    assert np.diff(hashed.offsets).tolist() == [len(tokens) for tokens in expected]
    flat = [token for tokens in expected for token in tokens]
    spans = zip(hashed.starts, hashed.ends, strict=True)
    assert [hashed.joined[a:z] for a, z in spans] == flat
    one_hash = {}
    for token, value in zip(flat, hashed.values.tolist(), strict=True):
        assert one_hash.setdefault(token, value) == value
    assert len(set(one_hash.values())) == len(one_hash)


@given(TEXTS, st.integers(1, 4))
def test_ngrams_stay_inside_their_text(texts, n):
    tokens = hash_tokens(texts)
    hashed = ngrams(tokens, n)
    expected = [max(0, len(words(text)) - n + 1) for text in texts]
    assert np.diff(hashed.offsets).tolist() == expected
    alone = [ngrams(hash_tokens([text]), n).values for text in texts]
    np.testing.assert_array_equal(hashed.values, np.concatenate(alone))


@given(TEXTS, st.integers(1, 30))
def test_chunks_keep_order_and_lose_nothing(texts, size):
    parts = list(chunks(texts, size))
    assert [text for part in parts for text in part] == texts and all(parts)


def test_the_hash_is_the_same_on_every_machine_and_day():
    assert hash_tokens(["Hello world"]).values.tolist() == [16965158064766073078, 4160489664314162120]


def test_segments_may_be_empty():
    assert segment_sums(np.arange(5.0), np.array([0, 0, 2, 2, 5, 5])).tolist() == [0, 1, 0, 9, 0]


def test_ngram_vectors_are_closer_for_like_texts():
    a, b, c, empty = ngram_vectors(["the cat sat on the mat", "the cat sat on a mat", "prime factors of 2800", " "])
    assert a @ b > 0.6 > 0.2 > a @ c and not empty.any()
    assert np.linalg.norm(a) == pytest.approx(1, abs=SUM)


# BM25


def naive_bm25(docs, queries, k1=1.5, b=0.75):
    """Lucene's BM25 by the formula, a loop at a time: (n, m)."""
    tokens = [words(doc) for doc in docs]
    average = sum(map(len, tokens)) / len(tokens)
    df = Counter(word for doc in tokens for word in set(doc))
    out = np.zeros((len(docs), len(queries)))
    for m, query in enumerate(queries):
        for n, doc in enumerate(tokens):
            tf = Counter(doc)
            for word in words(query):
                if tf[word]:
                    idf = log(1 + (len(docs) - df[word] + 0.5) / (df[word] + 0.5))
                    out[n, m] += idf * tf[word] / (tf[word] + k1 * (1 - b + b * len(doc) / average))
    return out


@settings(deadline=None)
@given(WORDY.filter(lambda docs: any(map(words, docs))), WORDY)
def test_bm25_is_the_naive_one(docs, queries):
    scores, per_query = bm25(docs, queries, ["x"] * len(queries), per="query", reduce="mean")
    expected = naive_bm25(docs, queries)
    np.testing.assert_allclose(per_query, expected, rtol=SUM, atol=SUM)
    np.testing.assert_allclose(scores, expected.mean(axis=1), rtol=SUM, atol=SUM)


def test_bm25_takes_the_mean_in_a_task_and_the_max_over_tasks():
    docs = ["the cat sat", "a dog ran", "the dog and the cat sat"]
    queries, tasks = ["cat", "cat sat", "dog"], ["b", "b", "a"]
    per_query = naive_bm25(docs, queries)
    scores, per_task = bm25(docs, queries, tasks)
    expected = np.stack([per_query[:, 2], per_query[:, :2].mean(axis=1)], axis=1)  # tasks in the order of their names
    np.testing.assert_allclose(per_task, expected, rtol=SUM)
    np.testing.assert_allclose(scores, expected.max(axis=1), rtol=SUM)


def test_bm25_where_nothing_matches_and_where_there_is_nothing():
    scores, per_task = bm25(["cat", ""], ["zebra", "..."], ["a", "b"])
    assert scores.tolist() == [0, 0] and per_task.shape == (2, 2)
    assert bm25([], ["cat"], ["a"])[1].shape == (0, 1)
    with pytest.raises(ValueError, match="1 queries but 2 tasks"):
        bm25(["cat"], ["cat"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        bm25(["cat"], [], [])


# DSIR


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
    scores, _ = dsir(docs, target, gumbel=False, n_buckets=101)
    pool, wanted = naive_counts(docs, n_buckets=101), naive_counts(target, n_buckets=101).sum(axis=0)
    p, q = wanted / wanted.sum(), pool.sum(axis=0) / pool.sum()
    np.testing.assert_allclose(scores, pool @ (np.log(p + 1e-8) - np.log(q + 1e-8)), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(WORDY, WORDY, st.sampled_from(["sha256", "fast"]))
def test_dsir_counts_of_shards_add_up_to_the_whole(first, second, hash):
    whole = NgramBuckets(hash=hash).counts(first + second)
    np.testing.assert_array_equal(NgramBuckets(hash=hash).counts(first) + NgramBuckets(hash=hash).counts(second), whole)
    ratios = np.random.default_rng(0).normal(size=(10_000, 2))
    parts = [NgramBuckets(hash=hash).log_weights(texts, ratios) for texts in (first, second)]
    np.testing.assert_array_equal(np.concatenate(parts), NgramBuckets(hash=hash).log_weights(first + second, ratios))


def test_the_table_of_buckets_grows_without_forgetting():
    table = Sha256Buckets(97)
    slots = len(table.keys)
    texts = [f"word{i}" for i in range(slots)]
    for _ in range(2):  # digested, then remembered
        found = table(hash_tokens(texts), 1)
        assert found.tolist() == [int(sha256(t.encode()).hexdigest(), 16) % 97 for t in texts]
        assert table.size == slots
    assert 2 * table.size <= len(table.keys)


def test_a_full_table_still_answers_right():
    table = Sha256Buckets(97, most=100)
    texts = [f"word{i}" for i in range(300)]
    for _ in range(2):
        assert table(hash_tokens(texts), 1).tolist() == [int(sha256(t.encode()).hexdigest(), 16) % 97 for t in texts]
    assert table.size == 100


def test_a_second_pass_over_kept_and_unkept_chunks_is_the_same():
    texts = [f"some words number {i}" for i in range(50)]
    hashing = NgramBuckets()
    room = 3 * sum(b.nbytes + o.nbytes for b, o in hashing.chunk(texts)) // 50
    pool = Twice(hashing, texts, keep_bytes=room)
    pool.texts = [[text] for text in texts]
    first, second = hashing.sum_counts(pool), hashing.sum_counts(pool)
    assert 0 < len(pool.kept) < 50
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, hashing.counts(texts))


def test_dsir_by_task_is_dsir_on_each_tasks_target():
    docs = ["the cat sat", "3 + 4 = 7", "a dog ran after the cat"]
    target, tasks = ["cat and dog", "1 + 2 = 3", "a cat"], ["pets", "sums", "pets"]
    scores, per_task = dsir(docs, target, tasks, gumbel=False)
    for j, task in enumerate(["pets", "sums"]):
        alone, _ = dsir(docs, [t for t, k in zip(target, tasks, strict=True) if k == task], gumbel=False)
        np.testing.assert_allclose(per_task[:, j], alone)
    np.testing.assert_allclose(scores, per_task.max(axis=1))


def test_dsir_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="content ids"):
        dsir(["cat"], ["cat"])
    with pytest.raises(ValueError, match="at least one word"):
        dsir(["cat"], [" "], gumbel=False)
    with pytest.raises(ValueError, match="at least 1"):
        dsir(["cat"], [], gumbel=False)
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


# planted truth


def test_target_aware_text_methods_find_the_planted_tenth():
    rng = np.random.default_rng(0)
    common = [f"word{i}" for i in range(300)]
    special = [f"topic{i}" for i in range(40)]

    def text(on_task):
        return " ".join(rng.choice(special if on_task and rng.random() < 0.5 else common) for _ in range(40))

    truth = np.arange(400) % 10 == 0
    docs, target = [text(t) for t in truth], [text(True) for _ in range(12)]
    ids = [str(i) for i in range(400)]
    vectors = ngram_vectors(docs)

    recall = {}
    for name, scores in {
        "bm25": bm25(docs, target, ["t"] * 12)[0],
        "dsir": dsir(docs, target, gumbel=False, per_token=True)[0],
        "rds": rds(vectors, ngram_vectors(target), ["t"] * 12)[0],
        "random": uniform_by_id(ids, 0),
    }.items():
        recall[name] = truth[np.argsort(-scores)[:40]].mean()
    assert min(recall["bm25"], recall["dsir"], recall["rds"]) >= 0.9 and recall["random"] < 0.3, recall


def test_bm25_says_nothing_on_stderr():
    code = "from keepset.methods.bm25 import bm25; bm25(['a b', 'c'], ['a'], ['t'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
