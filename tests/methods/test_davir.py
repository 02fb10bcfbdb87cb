"""DavIR and RHO: hand-worked numbers and exact properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from keepset.methods.davir import davir, davir_ref, rho

LOSS = st.floats(0.01, 500)


ROWS = st.lists(st.tuples(LOSS, LOSS, st.integers(1, 400)), min_size=1, max_size=30)


def test_davir_and_rho_by_hand():
    """Two answers.

    A: 4 tokens, base 8 nats (2 a token), reference 6 nats: drop 2, relative 2/8 = 0.25, to the reference 2/6.
    B: 10 tokens, base 10 nats (1 a token), reference 7 nats: drop 3, relative 0.3, to the reference 3/7.
    RHO's sum ranks B first (3 > 2), its mean A first (0.5 > 0.3): the form matters. DavIR: B first in either form.
    """
    ini, ref, tokens = np.array([8.0, 10.0]), np.array([6.0, 7.0]), np.array([4, 10])
    np.testing.assert_allclose(davir(ini, ref), [0.25, 0.3])
    np.testing.assert_allclose(davir_ref(ini, ref), [1 / 3, 3 / 7])
    np.testing.assert_allclose(rho(ini, ref), [2, 3])
    np.testing.assert_allclose(rho(ini, ref, tokens, form="mean"), [0.5, 0.3])
    np.testing.assert_allclose(davir(ini / tokens, ref / tokens), [0.25, 0.3])


@given(ROWS)
def test_davir_properties(rows):
    ini, ref, tokens = (np.array(x, dtype=float) for x in zip(*rows, strict=True))
    score = davir(ini, ref)
    np.testing.assert_allclose(davir(ini / tokens, ref / tokens), score, atol=1e-12)  # sum = mean
    assert (score <= 1).all() and (davir(ini, ini) == 0).all()
    # the /ref form is a rising function of the /ini form: one ranking
    other = davir_ref(ini, ref)
    np.testing.assert_allclose(other, score / (1 - score), rtol=1e-6, atol=1e-9)
    order = np.argsort(score, kind="stable")
    assert (np.diff(other[order]) >= -1e-9 * (1 + np.abs(other[order][1:]))).all()


def test_one_ranking_one_spearman_but_not_one_pearson():
    rng = np.random.default_rng(0)
    ini, ref, tokens = rng.gamma(3, 30, 2000), rng.gamma(3, 20, 2000), rng.integers(1, 300, 2000)
    a, b = davir(ini, ref), davir_ref(ini, ref)
    np.testing.assert_array_equal(np.argsort(-a), np.argsort(-b))
    assert spearmanr(a, tokens)[0] == pytest.approx(spearmanr(b, tokens)[0], abs=1e-12)
    assert np.corrcoef(a, b)[0, 1] < 0.9  # two scales


def test_a_zero_loss_is_not_hidden():
    assert np.isnan(davir(np.zeros(1), np.zeros(1)))[0] and davir(np.zeros(1), np.ones(1))[0] == -np.inf
    assert np.isnan(davir(np.array([np.nan]), np.ones(1)))[0]
    with pytest.raises(ValueError, match="n_tokens"):
        rho(np.ones(2), np.ones(2), form="mean")
    with pytest.raises(ValueError, match=r"\(2,\) and loss_ref \(3,\)"):
        davir(np.ones(2), np.ones(3))
