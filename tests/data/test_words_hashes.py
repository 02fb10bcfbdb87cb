"""Hashed tokens, n-grams, chunks and n-gram vectors against slow and obvious twins."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.data.words import chunks, hash_tokens, ngram_vectors, ngrams, segment_sums, words
from tolerance import tolerance

SUM = tolerance(64)  # bm25s and the vectors are float32; a text of these tests has fewer words


# scripts with spaces, no combining marks: the rest is in data/test_words.py
TEXT = st.text(alphabet=st.sampled_from("aAbz9_ .,\n\té²ßΣς—\x00\U0001f600"), max_size=40)


TEXTS = st.lists(TEXT, min_size=1, max_size=8)


@given(TEXTS, st.booleans())
def test_hashed_tokens_are_the_regular_expressions_tokens(texts, punctuation):
    pattern = r"\w+|[^\w\s]+" if punctuation else r"\w+"
    hashed = hash_tokens(texts, punctuation=punctuation)
    expected = [re.findall(pattern, text.lower()) for text in texts]
    assert np.diff(hashed.offsets).tolist() == [len(tokens) for tokens in expected]
    flat = [token for tokens in expected for token in tokens]
    spans = zip(hashed.starts, hashed.ends, strict=True)
    assert [hashed.joined[a:z] for a, z in spans] == flat
    one_hash = {}
    for token, value in zip(flat, hashed.values.tolist(), strict=True):
        assert one_hash.setdefault(token, value) == value
    assert len(set(one_hash.values())) == len(one_hash)


@given(TEXTS, st.integers(1, 4))
def test_ngrams_stay_inside_their_text(texts, n):
    tokens = hash_tokens(texts)
    hashed = ngrams(tokens, n)
    expected = [max(0, len(words(text)) - n + 1) for text in texts]
    assert np.diff(hashed.offsets).tolist() == expected
    alone = [ngrams(hash_tokens([text]), n).values for text in texts]
    np.testing.assert_array_equal(hashed.values, np.concatenate(alone))


@given(TEXTS, st.integers(1, 30))
def test_chunks_keep_order_and_lose_nothing(texts, size):
    parts = list(chunks(texts, size))
    assert [text for part in parts for text in part] == texts and all(parts)


def test_the_hash_is_the_same_on_every_machine_and_day():
    assert hash_tokens(["Hello world"]).values.tolist() == [16965158064766073078, 4160489664314162120]


def test_segments_may_be_empty():
    assert segment_sums(np.arange(5.0), np.array([0, 0, 2, 2, 5, 5])).tolist() == [0, 1, 0, 9, 0]


def test_ngram_vectors_are_closer_for_like_texts():
    a, b, c, empty = ngram_vectors(["the cat sat on the mat", "the cat sat on a mat", "prime factors of 2800", " "])
    assert a @ b > 0.6 > 0.2 > a @ c and not empty.any()
    assert np.linalg.norm(a) == pytest.approx(1, abs=SUM)
