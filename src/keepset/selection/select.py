"""From scores to a subset: budget, policy, quotas, duplicates. A pure function; ties by content id, never position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepset.data.ids import content_key
from keepset.data.words import ngram_vectors
from keepset.errors import RecipeError
from keepset.methods.perplexity import percentile
from keepset.recipe import SelectSpec
from keepset.selection.budget import Ledger
from keepset.selection.dedup import exact_keep, near_keep
from keepset.selection.greedy import facility_location, mmr
from keepset.selection.ranking import rank_order, soft_scores
from keepset.selection.transport import density, knn_kde, nearest_rows, transport

BY_COLUMNS = ("round_robin", "knn_kde", "transport")
"""Policies that look at the score of each task or query."""
BY_TEXTS = ("knn_kde", "mmr", "facility_location")
"""Policies that compare rows with each other."""


def select(
    scores: np.ndarray,
    ids: Sequence[str] | np.ndarray,
    budget: tuple[str, int],
    *,
    spec: SelectSpec | None = None,
    n_tokens: np.ndarray | None = None,
    groups: Sequence[str] | np.ndarray | None = None,
    per_task: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    embeddings: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose rows: the indices of the chosen ones, best first (in the order the policy took them).

    Args:
        scores: (n,) larger = better, all finite.
        ids: (n,) content ids; they alone break ties.
        budget: ("rows", k) or ("tokens", t), as `keepset.budget_text.parse_budget` returns it. A token budget is never
            exceeded: a row that doesn't fit is passed over, a later, shorter one may still fit.
        spec: policy, quota, duplicates; default: plain top-k.
        n_tokens: (n,) supervised tokens; needed for a token budget.
        groups: (n,) source or category; needed for a quota.
        per_task: (n, j) score by task or query; needed for `round_robin`, `knn_kde` and `transport`.
        texts: (n,) needed for `dedup: near`; used for `knn_kde`, `mmr` and `facility_location` without embeddings.
        embeddings: (n, d) for `knn_kde`, `mmr` and `facility_location`; default: hashed word n-grams of `texts`.
        seed: for `sample`.

    Raises:
        RecipeError: the spec needs something that isn't there.
        ValueError: a score that isn't finite, lengths that differ.
    """
    spec = spec or SelectSpec()
    scores = np.asarray(scores, dtype=np.float64)
    order = rank_order(scores, ids)
    order = order[_distinct(ids, order, texts, spec)[order]]
    unit, amount = budget
    if not len(order):
        return order
    if unit == "tokens" and n_tokens is None:
        raise RecipeError("a token budget needs the number of tokens of every row")
    costs = np.ones(len(scores), dtype=np.int64) if n_tokens is None or unit == "rows" else np.asarray(n_tokens)
    if unit == "rows" and spec.policy == "top_k" and spec.quota == "none":
        return order[:amount]
    label = None if groups is None else np.asarray(groups)
    ledger = Ledger(amount, costs, order, groups=label, quota=spec.quota, floor=spec.quota_floor)
    if spec.policy in BY_COLUMNS and per_task is None:
        raise RecipeError(f"policy '{spec.policy}' needs a method that scores rows by task, such as rose, rds or bm25")
    if spec.policy == "round_robin":
        _round_robin(np.asarray(per_task), np.asarray(ids), order, ledger)
    elif spec.policy in BY_COLUMNS:
        order = order[_by_mass(np.asarray(per_task)[order], np.asarray(ids)[order], order, spec, texts, embeddings)]
        ledger.fill(order.tolist())
    elif spec.policy in ("mmr", "facility_location"):
        vectors, relevance = _vectors(order, texts, embeddings, spec.policy), percentile(scores[order])
        if spec.policy == "mmr":
            mmr(vectors, relevance, order, ledger, diversity=spec.diversity)
        else:
            k = amount if unit == "rows" else round(amount / max(1.0, float(costs[order].mean())))
            facility_location(vectors, relevance, order, ledger, k=min(k, len(order)), diversity=spec.diversity)
    else:
        if spec.policy == "sample":
            soft = soft_scores(scores[order], np.asarray(ids)[order], temperature=spec.temperature, seed=seed)
            order = order[rank_order(soft, np.asarray(ids)[order])]
        ledger.fill(order.tolist())
    if ledger.owed_in_all:
        taken = set(ledger.taken)
        ledger.release_floors()
        ledger.fill(row for row in order.tolist() if row not in taken)
    return np.asarray(ledger.taken, dtype=np.int64)


def _distinct(
    ids: Sequence[str] | np.ndarray, order: np.ndarray, texts: Sequence[str] | None, spec: SelectSpec
) -> np.ndarray:
    """Mark the rows that stay after `dedup` (n,)."""
    if spec.dedup == "none":
        return np.ones(len(order), dtype=bool)
    if spec.dedup == "near":
        if texts is None:
            raise RecipeError("dedup 'near' needs the rows' texts")
        return near_keep(texts, order, threshold=spec.near_threshold)
    return exact_keep([content_key(str(i)) for i in ids] if texts is None else texts, order)


def _vectors(order: np.ndarray, texts: Sequence[str] | None, embeddings: np.ndarray | None, policy: str) -> np.ndarray:
    if embeddings is not None:
        return np.asarray(embeddings)[order]
    if texts is None:
        raise RecipeError(f"policy '{policy}' needs embeddings or the rows' texts")
    return ngram_vectors([texts[i] for i in order])


def _by_mass(
    columns: np.ndarray, ids: np.ndarray, order: np.ndarray, spec: SelectSpec, texts: Sequence[str] | None,
    embeddings: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """Places (n,) of the candidates, given in rank order with `columns` (n, m): what receives most from queries first.

    Equal masses, such as the 0 of rows that no query reaches, go by score; under `knn_kde`, where a query's rows mostly
    receive the same, first by how near they are to the query that they are nearest to.
    """
    if spec.policy == "transport":
        return np.argsort(-transport(columns, reg=spec.transport_reg), kind="stable")
    nearest = nearest_rows(columns, ids)
    looked_at, rho, place = np.unique(nearest), np.ones(len(order)), np.full(len(order), len(order))
    rho[looked_at] = density(_vectors(order[looked_at], texts, embeddings, spec.policy))
    np.minimum.at(place, nearest, np.arange(nearest.shape[1])[None])
    return np.lexsort((place, -knn_kde(columns, nearest, rho, alpha=spec.knn_alpha)))


def _round_robin(per_task: np.ndarray, ids: np.ndarray, candidates: np.ndarray, ledger: Ledger) -> None:
    """Let each task in turn take its best row that is left (RDS+, arXiv 2503.01807, section 3)."""
    queues = [iter(candidates[rank_order(column[candidates], ids[candidates])].tolist()) for column in per_task.T]
    seen: set[int] = set()
    while queues and ledger.left > 0:
        still = []
        for queue in queues:
            for row in queue:
                if row in seen:
                    continue
                seen.add(row)  # taken, or refused for good
                if ledger.admits(row):
                    ledger.take(row)
                    still.append(queue)
                    break
        queues = still
