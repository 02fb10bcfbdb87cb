"""The dimension of a projection for a stated error."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from keepset.errors import RecipeError  # noqa: E402
from keepset.features.projection import dimension_for  # noqa: E402


def test_dimension_for_a_stated_error() -> None:
    assert dimension_for(0.01) == 10048 and dimension_for(0.5) == 64
    with pytest.raises(RecipeError, match="between 0 and 1"):
        dimension_for(0)
