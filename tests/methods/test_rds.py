"""RDS against a loop over rows."""

import numpy as np
import pytest

from keepset.methods.rds import rds


def test_rds_is_a_loop_over_rows_and_blocks_do_not_matter():
    rng = np.random.default_rng(0)
    pool, queries, tasks = rng.normal(size=(9, 4)), rng.normal(size=(5, 4)), ["x", "y", "x", "y", "y"]
    expected = []
    for h in pool:
        cosines = {}
        for q, t in zip(queries, tasks, strict=True):
            cosines.setdefault(t, []).append(h @ q / np.linalg.norm(h) / np.linalg.norm(q))
        expected.append(max(np.mean(v) for v in cosines.values()))
    for block in (1, 4, 100):
        np.testing.assert_allclose(rds(pool, queries, tasks, block=block)[0], expected, rtol=1e-12)
    assert rds(pool, queries, tasks, per="query")[1].shape == (9, 5)
    assert np.isnan(rds(np.zeros((1, 4)), queries, tasks)[0])[0]
    with pytest.raises(ValueError, match="don't fit"):
        rds(pool, queries, tasks[:2])
