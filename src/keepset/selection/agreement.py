"""How far several scorings of one pool agree: across models, seeds, reference recipes, in-sample and cross-fitted.

Rows are matched by content id, so the run folders need not hold the same pool: the rows they share are compared. The
overlap of two top-k sets is |A ∩ B| / k; two random rankings give k / n on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa

from keepset.errors import RecipeError
from keepset.evaluate.statistics import correlations
from keepset.recipe import parse_budget
from keepset.runfolder.records import Agreement, PairAgreement, ScoringFacts
from keepset.selection.ranking import rank_order

SHARES = ("5%", "10%")


def agreement(tables: Mapping[str, pa.Table], budgets: Sequence[int | str] = SHARES) -> Agreement:
    """Compare every two scorings, tables with `id`, `score` and `n_tokens`, on the rows that all of them scored.

    Raises:
        RecipeError: fewer than two scorings, or fewer than 3 rows in common.
    """
    if len(tables) < 2:
        raise RecipeError("name at least two scorings: RUN_DIR or RUN_DIR:LABEL")
    scored = {name: finite_scores(table) for name, table in tables.items()}
    common = sorted(set.intersection(*(set(rows) for rows in scored.values())))
    if len(common) < 3:
        raise RecipeError(f"the scorings share {len(common)} rows; at least 3 are needed to compare them")
    ids = np.array(common)
    sizes = {str(b): min(len(ids), parse_budget(b, len(ids), None)[1]) for b in budgets}
    scores = {name: np.array([rows[i][0] for i in common]) for name, rows in scored.items()}
    n_tokens = {name: np.array([rows[i][1] for i in common]) for name, rows in scored.items()}
    best = {name: rank_order(values, ids) for name, values in scores.items()}
    pairs = []
    for a, b in combinations(tables, 2):
        overlap = {size: len(set(best[a][:k]) & set(best[b][:k])) / k for size, k in sizes.items()}
        pairs.append(PairAgreement(a, b, correlations(scores[a], scores[b]).spearman, overlap))
    scorings = {
        name: ScoringFacts(
            mean=float(values.mean()),
            length_spearman=correlations(values, n_tokens[name]).spearman,
            mean_tokens=float(n_tokens[name].mean()),
            mean_tokens_kept={size: float(n_tokens[name][best[name][:k]].mean()) for size, k in sizes.items()},
        )
        for name, values in scores.items()
    }
    chance = {size: k / len(ids) for size, k in sizes.items()}
    return Agreement(len(ids), sizes, chance, scorings, tuple(pairs))


def finite_scores(table: pa.Table) -> dict[str, tuple[float, int]]:
    """id -> (score, tokens) of the rows that have a score."""
    columns = (table[name].to_pylist() for name in ("id", "score", "n_tokens"))
    return {i: (s, t) for i, s, t in zip(*columns, strict=True) if s is not None and np.isfinite(s)}
