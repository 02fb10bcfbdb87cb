"""A budget as it stands in a recipe or on the command line: rows, a percentage, tokens."""

from __future__ import annotations

import re

from keepset.errors import RecipeError


def parse_budget(budget: int | str, n_rows: int, n_tokens: int | None) -> tuple[str, int]:
    """Turn a budget into `("rows", k)` or `("tokens", t)`.

    A budget is 500, "500", "5%" (of the rows) or "200000 tokens" ("20% tokens": of the pool's supervised tokens, if
    known).

    Raises:
        RecipeError: the text is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%?)\s*(tokens|rows)?\s*", str(budget))
    if match is None or float(match[1]) <= 0 or (match[2] and float(match[1]) > 100):
        raise RecipeError(f"budget '{budget}' is not a count (500), a percentage (5%) or tokens (200000 tokens)")
    number, unit = float(match[1]), match[3] or "rows"
    whole = n_rows if unit == "rows" else n_tokens
    if match[2]:
        return unit, max(1, int(number / 100 * (whole if whole is not None else 1) + 1e-9))
    if number != int(number):
        raise RecipeError(f"budget '{budget}': a count must be a whole number")
    return unit, int(number)
