"""Findings about scores."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from keepset.pipeline.findings import diagnose_scores


@pytest.mark.parametrize(
    ("sign", "level", "advice"),
    [(1, "warning", "`longest` control"), (-1, "warning", "controls.shortest"), (0, "info", "no strong")],
)  # fmt: skip
def test_a_tie_to_length_names_the_control_for_its_direction(sign, level, advice):
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 100, 40)
    score = sign * n_tokens + rng.normal(size=40)
    ids = [f"{i:02d}" for i in range(40)]
    table = pa.table({"id": ids, "score": score, "n_tokens": n_tokens, "source": ["a"] * 40})
    finding = next(f for f in diagnose_scores(table, "m") if f.name == "length-correlation")
    assert finding.level == level and advice in finding.advice
    assert np.sign(finding.figure) == sign or sign == 0
