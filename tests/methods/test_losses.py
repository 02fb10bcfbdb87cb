"""DavIR, RHO, IFD, perplexity, EL2N, forgetting, length, cross-fitting: hand-worked numbers and exact properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.data.ids import fold_of
from keepset.methods.el2n import el2n, grand
from keepset.methods.forgetting import forgetting
from keepset.methods.ifd import ifd
from keepset.methods.length import length
from keepset.methods.loss import loss
from keepset.methods.perplexity import perplexity


def test_ifd_ranks_high_but_not_above_one():
    given_prompt, alone, tokens = np.array([4.0, 9.0, 12.0, 30.0]), np.array([8.0, 10.0, 10.0, 10.0]), np.full(4, 5)
    np.testing.assert_allclose(ifd(given_prompt, alone, tokens), [0.5, 0.9, -1.2, -3.0])
    np.testing.assert_allclose(ifd(given_prompt, alone, ceiling=np.inf), [0.5, 0.9, 1.2, 3.0])
    # without a prompt one token goes unpredicted: means over different numbers of tokens
    np.testing.assert_allclose(ifd(np.array([4.0]), np.array([4.0]), np.array([5]), np.array([4])), [0.8])


def test_loss_mean_and_sum_high_and_low():
    nll, tokens = np.array([6.0, 4.0, 9.0]), np.array([2, 4, 9])
    assert loss(nll, tokens).tolist() == [3.0, 1.0, 1.0]
    assert loss(nll, tokens, form="sum").tolist() == [6.0, 4.0, 9.0]
    assert loss(nll, tokens, form="sum", prefer="low").tolist() == [-6.0, -4.0, -9.0]
    np.testing.assert_array_equal(loss(nll, tokens, prefer="high"), perplexity(nll, tokens, prefer="high"))
    with pytest.raises(ValueError, match="form"):
        loss(nll, tokens, form="median")


def test_perplexity_low_mid_high():
    nll, tokens = np.array([2.0, 30.0, 8.0, 100.0, 5.0]), np.array([2, 10, 2, 10, 2])  # means 1, 3, 4, 10, 2.5
    order = {p: np.argsort(-perplexity(nll, tokens, prefer=p), kind="stable").tolist() for p in ("low", "mid", "high")}
    assert order["low"] == [0, 4, 1, 2, 3] and order["high"] == order["low"][::-1]
    assert order["mid"][0] == 1 and set(order["mid"][-2:]) == {0, 3}
    with_nan = perplexity(np.array([1.0, np.nan, 3.0, 2.0]))
    assert np.isnan(with_nan[1]) and np.nanargmax(with_nan) == 3


def test_el2n_against_the_definition():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 9)), rng.integers(0, 9, 6)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    errors = np.linalg.norm(p - np.eye(9)[labels], axis=1)
    assert el2n(np.array([errors.sum()]), np.array([6]))[0] == pytest.approx(errors.mean())
    np.testing.assert_allclose(el2n(np.array([[2.0, 4.0], [4.0, 0.0]])), [3, 2])
    np.testing.assert_allclose(grand(np.array([[1.0, 2.0], [3.0, 2.0]])), [2, 2])


def test_forgetting_counts_flips_back():
    losses = np.array(  # rows: learnt for good, forgotten once, twice, never learnt
        [[3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 3.0], [0.5, 2.9, 2.9, 3.1], [0.4, 0.5, 1.0, 3.0], [0.3, 0.4, 2.8, 3.2]]
    ).reshape(5, 4)
    broken = forgetting(losses)
    assert np.argsort(broken).tolist() == [0, 1, 2, 3] and (np.floor(broken) == [0, 1, 2, 5]).all()
    assert np.isnan(forgetting(np.array([[1.0], [np.nan]])))[0]
    with pytest.raises(ValueError, match="two checkpoints"):
        forgetting(losses[:1])


def test_length_either_way():
    assert length(np.array([3, 9])).tolist() == [3, 9] and length(np.array([3, 9]), prefer="short").tolist() == [-3, -9]


@given(st.integers(4, 60), st.integers(2, 4), st.integers(0, 5))
def test_folds_are_even_kept_by_content_and_free_of_order(n, folds, seed):
    ids = np.array([f"{i:032x}" for i in range(n)] + [f"{i:032x}-1" for i in range(0, n, 3)], dtype=object)
    fold = fold_of(ids, folds, seed)
    assert np.ptp(np.bincount(fold[:n], minlength=folds)) <= 1
    np.testing.assert_array_equal(fold[n:], fold[:n:3])
    order = np.random.default_rng(seed).permutation(len(ids))
    np.testing.assert_array_equal(fold_of(ids[order], folds, seed), fold[order])


def test_more_folds_than_different_rows_are_refused():
    with pytest.raises(ValueError, match="from 2 to the 3 different rows"):
        fold_of(["a", "b", "c"], 4)
