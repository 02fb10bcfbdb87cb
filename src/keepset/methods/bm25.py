"""BM25: lexical retrieval (Robertson & Zaragoza 2009; Lucene's form as in Kamphuis et al. 2020), as bm25s has it.

    s(q, z) = Σ_{t in q} idf(t) · tf(t, z) / (tf(t, z) + k1 · (1 − b + b · |z| / avg|z|))
    idf(t)  = log(1 + (N − df(t) + 0.5) / (df(t) + 0.5))
    S(z)    = max_j mean_{q in task j} s(q, z)

z: a row's text; q: the words of a target prompt (or prompt and chosen answer), a repeated word counting each time; N
rows, df(t) of them with word t. Words are those of `text.py`; in scripts without spaces, characters and pairs of
neighbouring ones. No stop words, no stemming: both are English.

Only the queries' words need postings, so the index holds these plus one "any other word": same scores, a small index.
s is linear in the query's word counts, so a task's mean is one sparse product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from scipy import sparse

from keepset.data.words import chunks, hash_terms
from keepset.methods.method import Columns, Features, Method, Scores, task_parts
from keepset.methods.tasks import Reduce, reduce_tasks, task_columns


def bm25(
    docs: Sequence[str],
    queries: Sequence[str],
    tasks: Sequence[str] | np.ndarray,
    *,
    k1: float = 1.5,
    b: float = 0.75,
    reduce: Reduce = "max",
    per: Literal["task", "query"] = "task",
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by their BM25 relevance to the target.

    `docs` are the pool's n texts, `queries` the target's m, of tasks (m,). `k1` says how soon repeated words stop
    counting, `b` how far length is normalised, from 0 to 1. `per` says whether the second result has a column a task,
    or a query.

    Returns:
        scores (n,) and per_task (n, j), or (n, m) with per="query"; float64 of bm25s's float32 weights.

    Raises:
        ValueError: no query, or lengths that differ.
    """
    if len(queries) != len(tasks):
        raise ValueError(f"{len(queries)} queries but {len(tasks)} tasks")
    names, column = task_columns(np.arange(len(queries)) if per == "query" else tasks)
    hashed = hash_terms(queries)
    vocabulary, terms = np.unique(hashed.values, return_inverse=True)
    of_query = np.repeat(np.arange(len(queries)), np.diff(hashed.offsets))
    share = (1.0 / np.bincount(column))[column[of_query]]  # so that a column is its queries' mean
    weights = sparse.csr_matrix((share, (terms, column[of_query])), shape=(len(vocabulary) + 1, len(names)))
    if not len(docs):
        return np.zeros(0), np.zeros((0, len(names)))

    index = _Index(docs, vocabulary)
    per_column = np.concatenate([(part @ weights).toarray() for part in index.postings(docs, k1=k1, b=b)])
    return reduce_tasks(per_column, reduce), per_column


class _Index:
    """What a row's BM25 weights need of all rows: how many there are, their mean length, in how many each word is.

    Two passes over the texts; bm25s's own index of all rows would take hundreds of bytes a row. The weights are bm25s's
    to the bit, made of a chunk of rows at a time in its types.
    """

    def __init__(self, docs: Sequence[str], vocabulary: np.ndarray) -> None:
        self.vocabulary = vocabulary
        self.frequencies = np.zeros(len(vocabulary) + 1, dtype=np.int64)
        lengths = [np.zeros(0, dtype=np.int64)]
        for part in chunks(docs):
            words = self._counted(part)
            self.frequencies += np.bincount(words.term, minlength=len(self.frequencies))
            lengths.append(words.length)
        self.lengths = np.concatenate(lengths)

    def _counted(self, docs: Sequence[str]) -> _Words:
        """A chunk's words by row; the last place of the vocabulary stands for any other word."""
        hashed = hash_terms(docs)
        most = len(self.vocabulary)
        place = np.searchsorted(self.vocabulary, hashed.values)
        place[place == most] = 0
        known = self.vocabulary[place] == hashed.values if most else np.zeros(len(place), bool)
        length = np.diff(hashed.offsets)
        row = np.repeat(np.arange(len(docs)), length)
        pairs, times = np.unique(row * (most + 1) + np.where(known, place, most), return_counts=True)
        return _Words(pairs // (most + 1), pairs % (most + 1), times, length)

    def postings(self, docs: Sequence[str], *, k1: float, b: float) -> Iterator[sparse.csc_matrix]:
        """The BM25 weights of each chunk's words, (rows, words) float64 of bm25s's float32."""
        n, mean = len(self.lengths), self.lengths.mean()
        idf = np.array([log(1 + (n - df + 0.5) / (df + 0.5)) for df in self.frequencies.tolist()], dtype=np.float32)
        for part in chunks(docs):
            words = self._counted(part)
            times, length = words.times.astype(np.float32), words.length[words.row]
            share = times / (k1 * ((1 - b) + b * length / mean) + times)
            weight = (idf[words.term] * share).astype(np.float32).astype(np.float64)
            shape = (len(part), len(self.frequencies))
            yield sparse.csc_matrix((weight, (words.row, words.term)), shape=shape)


@dataclass(frozen=True)
class _Words:
    """Of a chunk's rows: row, term and number of times of each different word, and the rows' lengths."""

    row: np.ndarray
    term: np.ndarray
    times: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Bm25(Method):
    """Lexical similarity to the target's prompts."""

    name = "bm25"
    when = (
        "first, if you have target rows: seconds, no model, and in-domain rows found as well as by any other; "
        "right and wrong answers are alike to it"
    )
    paper = "Robertson & Zaragoza 2009"
    formula = "S = max_j mean_q BM25(q, z)"
    needs = ("text", "target")
    cost = "text"
    query: Literal["prompt", "prompt+chosen"] = "prompt"
    k1: float = 1.5
    b: float = 0.75
    reduce: Literal["max", "mean"] = "max"
    per: Literal["task", "query"] = "task"

    def score(self, features: Features) -> Scores:
        names, codes = features.tasks
        queries = features.target_texts(with_chosen=self.query == "prompt+chosen")
        score, per_task = bm25(features.texts(), queries, codes, k1=self.k1, b=self.b, reduce=self.reduce, per=self.per)
        if self.per == "query":
            names = [f"{names[code]}.{k}" for k, code in enumerate(codes)]
        return Scores(score, task_parts(names, per_task))

    def noise(self, columns: Columns, relative: float) -> None:
        """None: no model runs."""
