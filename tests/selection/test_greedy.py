"""MMR and facility location against exhaustive search and hand-worked choices."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.methods.perplexity import percentile
from keepset.recipe import SelectSpec
from keepset.selection.budget import Ledger
from keepset.selection.greedy import facility_location
from keepset.selection.select import select


def spec(**options) -> SelectSpec:
    return SelectSpec.model_validate(options)


def test_mmr_by_hand():
    """Rows 0 and 1 point one way, row 2 across: after row 0, row 1 costs λ·1 and row 2 nothing."""
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    scores, ids = np.array([4.0, 3.0, 2.0, 1.0]), list("abcd")

    def order(diversity):
        options = spec(policy="mmr", diversity=diversity)
        return select(scores, ids, ("rows", 4), spec=options, embeddings=vectors).tolist()

    assert order(0.0) == [0, 1, 2, 3]
    assert order(0.5) == [0, 2, 1, 3]
    assert order(1.0)[:3] == [0, 2, 3]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 1))
def test_facility_location_is_greedy_and_within_its_bound(seed, k, diversity):
    rng = np.random.default_rng(seed)
    n = 9
    vectors = rng.normal(size=(n, 3))
    scores, ids = rng.normal(size=n), [str(i) for i in range(n)]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = np.maximum(unit @ unit.T, 0)
    relevance = percentile(scores)

    def value(rows):
        rows = list(rows)
        cover = similarity[:, rows].max(axis=1).sum() if rows else 0.0
        return (1 - diversity) * relevance[rows].sum() + diversity * k / n * cover

    options = spec(policy="facility_location", diversity=diversity)
    chosen = select(scores, ids, ("rows", k), spec=options, embeddings=vectors).tolist()
    best = max(value(rows) for rows in combinations(range(n), k))
    assert value(chosen) >= (1 - 1 / np.e) * best - 1e-5
    plain: list[int] = []  # lazy evaluation must not change what greedy takes
    for row in chosen:
        gains = {i: value([*plain, i]) - value(plain) for i in range(n) if i not in plain}
        assert gains[row] >= max(gains.values()) - 1e-5
        plain.append(row)


def test_facility_location_covers_clusters_that_top_k_misses():
    rng = np.random.default_rng(0)
    centres = np.eye(6)[:4]
    cluster = np.repeat(np.arange(4), 25)
    vectors = centres[cluster] + 0.1 * rng.normal(size=(100, 6)) @ np.eye(6)
    scores = np.where(cluster == 0, 2.0, 0.0) + rng.random(100)
    ids = [str(i) for i in range(100)]
    options = spec(policy="facility_location", diversity=1.0)
    diverse = select(scores, ids, ("rows", 4), spec=options, embeddings=vectors)
    assert set(cluster[diverse]) == {0, 1, 2, 3} and set(cluster[select(scores, ids, ("rows", 4))]) == {0}
    blocks = select(scores, ids, ("rows", 20), spec=options, embeddings=vectors)
    assert len(set(blocks.tolist())) == 20


def test_facility_location_is_the_same_without_room_for_all_similarities():
    rng = np.random.default_rng(0)
    vectors, rows = rng.normal(size=(60, 4)), np.arange(60)
    taken = []
    for keep_bytes in (0, 1 << 20):
        ledger = Ledger(12, np.ones(60), rows)
        facility_location(
            vectors, np.linspace(1, 0, 60), rows, ledger, k=12, diversity=0.7, block=7, keep_bytes=keep_bytes
        )
        taken.append(ledger.taken)
    assert taken[0] == taken[1] and len(taken[0]) == 12


def test_texts_stand_in_for_embeddings():
    texts = ["add three and four", "add three and four now", "a poem about rain", "sort the list in python"]
    for policy in ("mmr", "facility_location"):
        chosen = select(
            np.array([4.0, 3.0, 2.0, 1.0]),
            list("abcd"),
            ("rows", 3),
            spec=spec(policy=policy, diversity=0.9),
            texts=texts,
        )
        assert 0 in chosen and len(set(chosen.tolist()) & {0, 1}) == 1
