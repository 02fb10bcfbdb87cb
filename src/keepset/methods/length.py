"""Length: the longest completions first, the control that gradient scores must be told apart from.

    S(z) = T(z),  T = number of supervised tokens (of the completion)

"Long is more for alignment" (arXiv 2402.04833) found it a strong baseline on Alpaca. `prefer="short"` turns the sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores


def length(n_tokens: np.ndarray, *, prefer: Literal["long", "short"] = "long") -> np.ndarray:
    """Score rows by their number of supervised tokens.

    Returns (n,) float64 tokens, negated for "short".
    """
    if prefer not in ("long", "short"):
        raise ValueError(f"prefer is 'long' or 'short', not {prefer!r}")
    tokens = np.asarray(n_tokens, dtype=np.float64)
    return tokens if prefer == "long" else -tokens


@dataclass(frozen=True)
class Length(Method):
    """Tokens of the completion (words in the torch-free core)."""

    name = "length"
    when = "as a control: what the longest (or shortest) rows alone would give"
    paper = "arXiv 2402.04833"
    formula = "S = T"
    needs = ("text",)
    cost = "free"
    prefer: Literal["long", "short"] = "long"

    def score(self, features: Features) -> Scores:
        return Scores(length(features.n_tokens, prefer=self.prefer))

    def noise(self, columns: Columns, relative: float) -> None:
        """None: no model runs."""
