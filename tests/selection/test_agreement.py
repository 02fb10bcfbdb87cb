"""How far scorings of one pool agree, against figures worked by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from keepset.errors import RecipeError
from keepset.runfolder.records import PairAgreement
from keepset.selection.agreement import agreement


def table(scores: list[float | None], n_tokens: list[int] | None = None) -> pa.Table:
    ids = [f"{i:02d}" for i in range(len(scores))]
    return pa.table({"id": ids, "score": scores, "n_tokens": n_tokens or [1 + i for i in range(len(scores))]})


def test_agreement_by_hand():
    a = table([9.0, 8.0, 7.0, 1.0, 0.0, None])
    b = table([8.0, 9.0, 1.0, 7.0, 0.0, 5.0])
    found = agreement({"a": a, "b": b}, [2, "60%"])
    assert found.n == 5  # the sixth row has no score in one of them
    assert found.pairs == (PairAgreement("a", "b", pytest.approx(0.8), {"2": 1.0, "60%": 2 / 3}),)
    assert found.chance == {"2": 0.4, "60%": 0.6}
    assert found.scorings["a"].mean_tokens_kept == {"2": 1.5, "60%": 2.0}
    assert found.scorings["a"].length_spearman == pytest.approx(-1.0)
    with pytest.raises(RecipeError, match="at least two"):
        agreement({"a": a})
    with pytest.raises(RecipeError, match="share 0 rows"):
        agreement({"a": a, "b": a.slice(0, 0)})
