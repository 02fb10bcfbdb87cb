"""DSIR: data selection by importance resampling (arXiv 2302.03169), on hashed n-grams.

    S(z) = Σ_b c_b(z) · [log(p_b + ε) − log(q_b + ε)]  (+ Gumbel noise: the top k are then a draw by weight exp S)

c_b(z): how many of z's unigrams and bigrams fall in bucket b of 10,000. p_b, q_b: share of bucket b among all n-grams
of the target and of the pool. ε = 1e-8. Tokens are runs of word characters and runs of other visible characters of the
lower-cased text (WordPunct).

Followed: the authors' `data-selection` package, its buckets included (`buckets.py`). Where we deviate: noise belongs to
content ids; no row is left out for having under 100 tokens; a target with tasks may be scored task by task; Python's
`re` decides what a letter is (NLTK's `regex` leaves out superscripts, and takes a mark without a letter for a word);
characters are tokens in scripts without spaces (`text.py`). Counts are whole and add up over shards.

S sums over a row's n-grams, and with a small target most of them are unseen there and cost log ε each: short rows win.
`per_token` divides by the number of n-grams; it is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keepset.data.buckets import Hash, NgramBuckets, Twice
from keepset.data.ids import gumbel_by_id
from keepset.methods.method import Columns, Features, Method, Scores, task_parts
from keepset.methods.tasks import Reduce, reduce_tasks, task_columns

SMOOTHING = 1e-8  # ε, added to each share


def dsir(
    docs: Sequence[str],
    target: Sequence[str],
    tasks: Sequence[str] | np.ndarray | None = None,
    *,
    ids: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
    per_token: bool = False,
    reduce: Reduce = "max",
    hash: Hash = "sha256",
) -> tuple[np.ndarray, np.ndarray]:
    """Score rows by how much likelier their n-grams are in the target than in the pool.

    Args:
        docs: n texts of the pool.
        target: m texts of the target.
        tasks: (m,) their tasks, each with its own statistics; None = one target, as in the paper.
        ids: (n,) content ids that Gumbel noise belongs to: top-k is then importance resampling without replacement.
            None: no noise, plain top-k.
        seed: of the noise.
        per_token: mean over the row's n-grams instead of the sum.
        reduce: "max" or "mean" over tasks.
        hash: "sha256" = the package's own buckets; "fast" = other collisions, about twice as quick.

    Returns:
        scores (n,) and per_task (n, j), the latter without noise.

    Raises:
        ValueError: no n-gram in the pool or in a task.
    """
    column = np.zeros(len(target), dtype=np.int64) if tasks is None else task_columns(tasks)[1]
    if len(column) != len(target) or not len(target):
        raise ValueError(f"{len(target)} target texts but {len(column)} tasks; both must be equal and at least 1")
    hashing = NgramBuckets(hash=hash)
    pool = Twice(hashing, docs)
    pool_counts = hashing.sum_counts(pool)
    of_task = [[t for t, j in zip(target, column, strict=True) if j == k] for k in range(column.max() + 1)]
    ratios = [log_ratio(hashing.counts(t), pool_counts) for t in of_task]
    per_task = hashing.weigh(pool, np.stack(ratios, axis=1), per_token=per_token)
    scores = reduce_tasks(per_task, reduce)
    return (scores if ids is None else scores + gumbel_by_id(ids, seed)), per_task


def log_ratio(target_counts: np.ndarray, pool_counts: np.ndarray) -> np.ndarray:
    """Return (n_buckets,) log(p + ε) − log(q + ε) from whole counts.

    Raises:
        ValueError: either side has no n-gram.
    """
    if target_counts.sum() == 0 or pool_counts.sum() == 0:
        raise ValueError("dsir: the pool and every task need at least one word")
    p, q = target_counts / target_counts.sum(), pool_counts / pool_counts.sum()
    return np.log(p + SMOOTHING) - np.log(q + SMOOTHING)


@dataclass(frozen=True)
class Dsir(Method):
    """Importance weight of the row's n-grams, target against pool."""

    name = "dsir"
    when = (
        "for pools of many millions, if the target's words say enough; it leans to short rows, and told "
        "nothing of the trained models in our bank"
    )
    paper = "DSIR, arXiv 2302.03169"
    formula = "S = Σ_b c_b(z) log(p_b / q_b) + Gumbel"
    needs = ("text", "target")
    cost = "text"
    query: Literal["prompt", "prompt+chosen"] = "prompt+chosen"
    gumbel: bool = True
    seed: int = 0
    per_token: bool = False
    by_task: bool = False
    reduce: Literal["max", "mean"] = "max"

    def score(self, features: Features) -> Scores:
        names, codes = features.tasks
        target = features.target_texts(with_chosen=self.query == "prompt+chosen")
        score, per_task = dsir(
            features.texts(), target, codes if self.by_task else None,
            ids=features.ids if self.gumbel else None, seed=self.seed, per_token=self.per_token, reduce=self.reduce,
        )  # fmt: skip
        return Scores(score, task_parts(names if self.by_task else ["all"], per_task))

    def noise(self, columns: Columns, relative: float) -> None:
        """None: no model runs."""

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.by_task:
            yield ("reduce",), "there is one task; set `by_task: true`"
        if not self.gumbel:
            yield ("seed",), "nothing is drawn under `gumbel: false`"
