"""BM25: lexical retrieval (Robertson & Zaragoza 2009; Lucene's form as in Kamphuis et al. 2020), by the bm25s library.

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

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
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
    import bm25s  # here, so that `import keepset` stays quick

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

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells each step of its work at DEBUG, on stderr
    index = bm25s.BM25(k1=k1, b=b, method="lucene", csc_backend="scipy")
    ids = _TermIds(docs, vocabulary)
    index.index(
        SimpleNamespace(ids=ids, vocab={str(i): i for i in range(len(vocabulary) + 1)}),
        create_empty_token=False,
        show_progress=False,
    )
    parts = index.scores
    postings = sparse.csc_matrix(
        (parts["data"], parts["indices"], parts["indptr"]), shape=(len(docs), len(vocabulary) + 1)
    )
    per_column = np.asarray((postings.astype(np.float64) @ weights).todense())
    return reduce_tasks(per_column, reduce), per_column


class _TermIds:
    """The rows' words as numbers: place in the vocabulary, or its size for any other word; lists are made as read."""

    def __init__(self, docs: Sequence[str], vocabulary: np.ndarray) -> None:
        numbers, counts = [], []
        for part in chunks(docs):
            hashed = hash_terms(part)
            place = np.searchsorted(vocabulary, hashed.values)
            place[place == len(vocabulary)] = 0
            in_vocabulary = vocabulary[place] == hashed.values if len(vocabulary) else np.zeros(len(place), bool)
            numbers.append(np.where(in_vocabulary, place, len(vocabulary)).astype(np.int32))
            counts.append(np.diff(hashed.offsets))
        self.numbers = np.concatenate(numbers)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.numbers[start:end].tolist()


@dataclass(frozen=True)
class Bm25(Method):
    """Lexical similarity to the target's prompts."""

    name = "bm25"
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
