"""Exact and near copies: the best row stays; MinHash against the quadratic loop."""

import numpy as np
import pytest

from keepset.data.ids import content_key
from keepset.data.words import hash_tokens, words
from keepset.recipe import SelectSpec
from keepset.selection.dedup import band_keys, jaccard, near_keep, shingles, signatures
from keepset.selection.select import select


def spec(**options) -> SelectSpec:
    return SelectSpec.model_validate(options)


SENTENCE = "the quick brown fox jumps over the lazy dog and then it runs back home again before night"


def test_exact_and_near_duplicates_leave_the_best_row():
    texts = [SENTENCE, SENTENCE, SENTENCE + " !!", SENTENCE.replace("fox", "cat"), "short one", "Short one.", "", ""]
    scores, ids = np.arange(8.0), [f"{i}" for i in range(8)]
    assert select(scores, ids, ("rows", 9), spec=spec(dedup="exact"), texts=texts).tolist() == [7, 5, 4, 3, 2, 1]
    near = select(scores, ids, ("rows", 9), spec=spec(dedup="near"), texts=texts).tolist()
    assert near == [7, 6, 5, 3, 2]  # 3 shares 9 of 19 shingles; a text without words is nobody's copy
    loose = select(scores, ids, ("rows", 9), spec=spec(dedup="near", near_threshold=0.4), texts=texts).tolist()
    assert loose == [7, 6, 5, 3]
    by_id = ["ab" * 16, "ab" * 16 + "-1", "cd" * 16]
    assert select(np.array([0.0, 1.0, 0.5]), by_id, ("rows", 9), spec=spec(dedup="exact")).tolist() == [1, 2]
    assert content_key("my-row-1") == "my-row-1"


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_the_quadratic_loop(threshold):
    """Every dropped row has a kept copy at the threshold; a pair is missed with a chance below 1 %."""
    different = rows = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = [rng.choice(list("abcdefgh"), 40).tolist() for _ in range(3)]
        texts = []
        for _ in range(12):
            row = list(base[rng.integers(3)])
            for _ in range(rng.integers(0, 4)):
                row[rng.integers(40)] = "z"
            texts.append(" ".join(row))
        order = rng.permutation(12)
        grams = [{tuple(words(t)[i : i + 5]) for i in range(len(words(t)) - 4)} for t in texts]

        def likeness(i, j, grams=grams):
            return len(grams[i] & grams[j]) / len(grams[i] | grams[j])

        kept: list[int] = []
        for i in order:
            if not any(likeness(i, j) >= threshold for j in kept):
                kept.append(int(i))
        keep = near_keep(texts, order, threshold=threshold)
        for i in np.flatnonzero(~keep):
            assert max(likeness(i, j) for j in np.flatnonzero(keep)) >= threshold
        different += len(set(np.flatnonzero(keep).tolist()) ^ set(kept))
        rows += len(texts)
    assert different / rows < 0.01, f"{different} of {rows} rows decided otherwise"


def test_signatures_estimate_jaccard():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(400)]
    a = rng.choice(vocabulary, 300, replace=False)
    errors = []
    for changed in range(0, 300, 30):
        b = a.copy()
        b[:changed] = [f"x{i}" for i in range(changed)]
        hashed = shingles([" ".join(a), " ".join(b)], 5)
        sets = [np.unique(hashed.values[hashed.offsets[i] : hashed.offsets[i + 1]]) for i in range(2)]
        marks = signatures(hashed, 256)
        errors.append((marks[0] == marks[1]).mean() - jaccard(*sets))
    assert np.abs(errors).max() < 0.1 and abs(np.mean(errors)) < 0.03  # one standard error is at most 0.031


def test_short_texts_are_one_shingle_and_empty_ones_none():
    hashed = shingles(["a b", "", "a b c d e f", "a b"], 5)
    assert np.diff(hashed.offsets).tolist() == [1, 0, 2, 1] and hashed.values[0] == hashed.values[3]
    assert hashed.values[0] != hash_tokens(["a b"]).values[0]
    assert not band_keys([""], 0.8, 5).any()
