"""The report's figures as numbers, over all rows of the run (the page's rows may be a sample). NumPy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from keepset.evaluate.statistics import correlations, spearman

BINS = 48
MAX_NAMES = 12  # bars of one chart; the rest is summed up as "other"


def number(value: float | None, digits: int = 6) -> float | None:
    """Round to some significant digits; None for NaN and infinities, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def cut_of(score: np.ndarray, selected: np.ndarray) -> float | None:
    """The lowest kept score, or None if nothing was kept."""
    kept = score[(selected > 0) & np.isfinite(score)]
    return float(kept.min()) if len(kept) else None


def histogram(score: np.ndarray, selected: np.ndarray) -> dict[str, Any] | None:
    """Counts of all and of kept rows over equal bins.

    A few far outliers would squeeze everything into one bin, so a tail beyond three times the inner 99 % range is
    counted in the outermost bin and `clipped` says how many rows that was.

    Returns:
        {"edges": BINS + 1 numbers, "all": counts, "kept": counts, "clipped": rows}, or None without two finite scores.
    """
    finite = np.isfinite(score)
    values = score[finite]
    if len(values) < 2:
        return None
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
    span = inner_high - inner_low
    if span > 0 and high - low > 3 * span:
        low, high = max(low, inner_low - span / 2), min(high, inner_high + span / 2)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    clipped = int(((values < low) | (values > high)).sum())
    values = np.clip(values, low, high)
    kept = selected[finite] > 0
    return {
        "edges": [number(float(e)) for e in edges],
        "all": np.histogram(values, edges)[0].tolist(),
        "kept": np.histogram(values[kept], edges)[0].tolist(),
        "clipped": clipped,
    }


def length_bucket(n_tokens: float) -> str:
    """Name of the power-of-two bucket a length falls into: 0-15, 16-31, 32-63 ..."""
    if not math.isfinite(n_tokens):
        return "unknown"
    low = 0 if n_tokens < 16 else 2 ** int(math.log2(n_tokens))
    return f"{low}–{max(15, 2 * low - 1)}"


def shares(names: np.ndarray, selected: np.ndarray, *, ordered: bool = False) -> list[dict[str, Any]]:
    """Rows of the pool and kept rows by name.

    `selected` is (n,) > 0 where kept. `ordered` keeps the buckets' numeric order; else the largest come first, and the
    tail is summed up as "other".
    """
    kept = selected > 0
    counts = [(str(name), int((names == name).sum()), int((kept & (names == name)).sum())) for name in set(names)]
    if ordered:
        counts.sort(key=lambda c: (not c[0][0].isdigit(), int(c[0].split("–")[0]) if c[0][0].isdigit() else 0))
    else:
        counts.sort(key=lambda c: (-c[1], c[0]))
    if len(counts) > MAX_NAMES:
        rest = counts[MAX_NAMES - 1 :]
        counts = [*counts[: MAX_NAMES - 1], (f"other ({len(rest)})", sum(c[1] for c in rest), sum(c[2] for c in rest))]
    return [{"name": name or "(none)", "pool": pool, "kept": n} for name, pool, n in counts]


def heat(parts: dict[str, np.ndarray], groups: np.ndarray, selected: np.ndarray) -> dict[str, Any] | None:
    """Mean of each task's part (n,) over the rows of each group (n,), beside the mean over the kept rows."""
    if not parts:
        return None
    names, sizes = np.unique(groups.astype(str), return_counts=True)
    names = names[np.argsort(-sizes, kind="stable")][:MAX_NAMES]
    kept = selected > 0
    rows = [("kept rows", kept), ("all rows", np.ones(len(groups), bool)), *((str(g), groups == g) for g in names)]
    return {
        "tasks": list(parts),
        "groups": [name or "(none)" for name, _ in rows],
        "mean": [[mean_of(values[mask]) for values in parts.values()] for _, mask in rows],
    }


def mean_of(values: np.ndarray) -> float | None:
    """Mean of the finite values, or None."""
    values = values[np.isfinite(values)]
    return number(float(values.mean()), 4) if len(values) else None


def overlap(columns: dict[str, dict[str, np.ndarray]]) -> dict[str, Any] | None:
    """Jaccard of the kept rows and Spearman of the scores, for every pair of methods."""
    labels = list(columns)
    if len(labels) < 2:
        return None
    kept = {label: columns[label]["selected"] > 0 for label in labels}

    def jaccard(a: str, b: str) -> float | None:
        union = int((kept[a] | kept[b]).sum())
        return number(int((kept[a] & kept[b]).sum()) / union, 4) if union else None

    def rank_correlation(a: str, b: str) -> float | None:
        x, y = columns[a]["score"], columns[b]["score"]
        both = np.isfinite(x) & np.isfinite(y)
        return number(spearman(x[both], y[both]), 4) if both.sum() >= 3 else None

    return {
        "labels": labels,
        "jaccard": [[jaccard(a, b) for b in labels] for a in labels],
        "spearman": [[rank_correlation(a, b) for b in labels] for a in labels],
    }


def length_correlation(score: np.ndarray, n_tokens: np.ndarray) -> dict[str, float | None] | None:
    """Pearson and Spearman of score and length over the rows where both are known."""
    both = np.isfinite(score) & np.isfinite(n_tokens)
    if both.sum() < 3:
        return None
    link = correlations(score[both], n_tokens[both])
    return {"pearson": number(link.pearson, 4), "spearman": number(link.spearman, 4)}
