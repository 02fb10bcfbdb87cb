"""BM25 against a loop over documents, queries and terms."""

import subprocess
import sys
from collections import Counter
from math import log
from types import SimpleNamespace

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from keepset.data.ids import uniform_by_id
from keepset.data.words import ngram_vectors, words
from keepset.methods.bm25 import bm25
from keepset.methods.dsir import dsir
from keepset.methods.rds import rds
from tolerance import tolerance

SUM = tolerance(64)  # weights and vectors are float32; a text of these tests has fewer words


WORDY = st.lists(st.lists(st.sampled_from("the cat dog sat 42 ran on".split()), max_size=12).map(" ".join), min_size=1)


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


@settings(deadline=None)
@given(WORDY.filter(lambda docs: any(map(words, docs))), WORDY, st.sampled_from([(1.5, 0.75), (0.9, 0.4), (2.0, 1.0)]))
def test_bm25_is_the_bm25s_library_to_the_bit(docs, queries, parameters):
    k1, b = parameters
    names = sorted({word for text in [*docs, *queries] for word in words(text)})
    index = bm25s.BM25(k1=k1, b=b, method="lucene", csc_backend="scipy")
    ids = [[names.index(word) for word in words(doc)] for doc in docs]
    vocabulary = {name: i for i, name in enumerate(names)}
    index.index(SimpleNamespace(ids=ids, vocab=vocabulary), create_empty_token=False, show_progress=False)
    parts = index.scores
    weights = sparse.csc_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=(len(docs), len(names)))
    ours = bm25(docs, names, names, k1=k1, b=b, per="query")[1]  # each word a query of its own
    assert ours.tolist() == weights.astype(np.float64).toarray().tolist()
    both = bm25(docs, queries, ["x"] * len(queries), k1=k1, b=b, per="query")[1]
    alone = np.array([[sum(ours[i, names.index(w)] for w in words(q)) for q in queries] for i in range(len(docs))])
    np.testing.assert_allclose(both, alone.reshape(both.shape), rtol=1e-12)


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
        "dsir": dsir(docs, target, per_token=True)[0],
        "rds": rds(vectors, ngram_vectors(target), ["t"] * 12)[0],
        "random": uniform_by_id(ids, 0),
    }.items():
        recall[name] = truth[np.argsort(-scores)[:40]].mean()
    assert min(recall["bm25"], recall["dsir"], recall["rds"]) >= 0.9 and recall["random"] < 0.3, recall


def test_bm25_says_nothing_on_stderr():
    code = "from keepset.methods.bm25 import bm25; bm25(['a b', 'c'], ['a'], ['t'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
