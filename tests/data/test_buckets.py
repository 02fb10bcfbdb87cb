"""N-gram buckets: shards add up, the SHA-256 table grows and may be full, a second pass is the same."""

from hashlib import sha256

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.data.buckets import NgramBuckets, Sha256Buckets, Twice
from keepset.data.words import hash_tokens

WORDY = st.lists(st.lists(st.sampled_from("the cat dog sat 42 ran on".split()), max_size=12).map(" ".join), min_size=1)


@settings(deadline=None)
@given(WORDY, WORDY, st.sampled_from(["sha256", "fast"]))
def test_dsir_counts_of_shards_add_up_to_the_whole(first, second, hash):
    whole = NgramBuckets(hash=hash).counts(first + second)
    np.testing.assert_array_equal(NgramBuckets(hash=hash).counts(first) + NgramBuckets(hash=hash).counts(second), whole)
    ratios = np.random.default_rng(0).normal(size=(10_000, 2))

    def weigh(texts):
        return NgramBuckets(hash=hash).weigh(Twice(NgramBuckets(hash=hash), texts), ratios, per_token=False)

    np.testing.assert_array_equal(np.concatenate([weigh(first), weigh(second)]), weigh(first + second))


def test_the_table_of_buckets_grows_without_forgetting():
    table = Sha256Buckets(97)
    slots = len(table.keys)
    texts = [f"word{i}" for i in range(slots)]
    for _ in range(2):  # digested, then remembered
        found = table(hash_tokens(texts), 1)
        assert found.tolist() == [int(sha256(t.encode()).hexdigest(), 16) % 97 for t in texts]
        assert table.size == slots
    assert 2 * table.size <= len(table.keys)


def test_a_full_table_still_answers_right():
    table = Sha256Buckets(97, most=100)
    texts = [f"word{i}" for i in range(300)]
    for _ in range(2):
        assert table(hash_tokens(texts), 1).tolist() == [int(sha256(t.encode()).hexdigest(), 16) % 97 for t in texts]
    assert table.size == 100


def test_a_second_pass_over_kept_and_unkept_chunks_is_the_same():
    texts = [f"some words number {i}" for i in range(50)]
    hashing = NgramBuckets()
    room = 3 * sum(b.nbytes + o.nbytes for b, o in hashing.chunk(texts)) // 50
    pool = Twice(hashing, texts, keep_bytes=room)
    pool.texts = [[text] for text in texts]
    first, second = hashing.sum_counts(pool), hashing.sum_counts(pool)
    assert 0 < len(pool.kept) < 50
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, hashing.counts(texts))
