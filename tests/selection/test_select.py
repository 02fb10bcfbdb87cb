"""Choosing rows: budgets, ties, quotas, round-robin, sampling, duplicates, MMR and facility location."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.data.words import hash_tokens, words
from keepset.errors import RecipeError
from keepset.recipe import SelectSpec
from keepset.selection.budget import Ledger, shares
from keepset.selection.dedup import band_keys, content_key, jaccard, near_keep, shingles, signatures
from keepset.selection.greedy import facility_location
from keepset.selection.ranking import percentile, rank_order, soft_scores
from keepset.selection.select import select

POLICIES = ["top_k", "round_robin", "mmr", "facility_location", "sample"]
QUOTAS = ["none", "proportional", "equal", "floor"]


def spec(**options) -> SelectSpec:
    return SelectSpec.model_validate(options)


def pool(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "scores": rng.integers(0, 8, n).astype(float),  # many ties
        "ids": np.array([f"{i:032x}" for i in rng.permutation(n)], dtype=object),
        "n_tokens": rng.integers(1, 40, n),
        "groups": np.array(rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]), dtype=object),
        "per_task": rng.normal(size=(n, 3)),
        "embeddings": rng.normal(size=(n, 5)),
    }


def choose(rows, budget, **options):
    rest = {k: v for k, v in rows.items() if k not in ("scores", "ids")}
    return select(rows["scores"], rows["ids"], budget, spec=spec(**options), **rest)


# order and budget


def test_ties_go_to_the_smaller_id_wherever_it_stands():
    assert select(np.array([1.0, 2.0, 2.0, 2.0]), ["a", "d", "b", "c"], ("rows", 2)).tolist() == [2, 3]


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(POLICIES), st.sampled_from(QUOTAS), st.sampled_from(["rows", "tokens"]))
def test_every_policy_keeps_the_budget_and_forgets_the_order_of_rows(seed, policy, quota, unit):
    rows, options = pool(seed=seed), {"policy": policy, "quota": quota, "quota_floor": 0.2}
    budget = (unit, 7 if unit == "rows" else 120)
    chosen = choose(rows, budget, **options)
    assert len(set(chosen.tolist())) == len(chosen)
    if unit == "rows":
        assert len(chosen) == 7
    else:
        spent = rows["n_tokens"][chosen].sum()
        assert spent <= 120
        if quota in ("none", "floor"):  # and no row that would still fit was left
            assert rows["n_tokens"][np.setdiff1d(np.arange(30), chosen)].min() > 120 - spent
    order = np.random.default_rng(seed).permutation(30)
    shuffled = {key: values[order] for key, values in rows.items()}
    again = choose(shuffled, budget, **options)
    assert rows["ids"][chosen].tolist() == shuffled["ids"][again].tolist()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_top_k_grows_with_k_and_is_best_first(scores, k, more):
    ids = [f"{i}" for i in range(len(scores))]
    small = select(np.array(scores, float), ids, ("rows", k)).tolist()
    large = select(np.array(scores, float), ids, ("rows", k + more)).tolist()
    assert large[: len(small)] == small and len(small) == min(k, len(scores))
    assert sorted((scores[i] for i in small), reverse=True) == [scores[i] for i in small]


def test_a_score_that_is_not_finite_is_refused():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="1 scores are not finite, the first is row b"):
            select(np.array([1.0, bad]), ["a", "b"], ("rows", 1))
    with pytest.raises(ValueError, match="don't fit"):
        rank_order(np.ones(2), ["a"])


@pytest.mark.parametrize(
    "budget, options, message",
    [
        (("tokens", 5), {}, "number of tokens"),
        (("rows", 1), {"quota": "equal"}, "needs a source or category"),
        (("rows", 1), {"policy": "round_robin"}, "scores rows by task"),
        (("rows", 1), {"policy": "mmr"}, "needs embeddings or the rows' texts"),
        (("rows", 1), {"dedup": "near"}, "needs the rows' texts"),
    ],
)
def test_what_is_missing_is_named(budget, options, message):
    with pytest.raises(RecipeError, match=message):
        select(np.ones(2), ["a", "b"], budget, spec=spec(**options))


def test_an_empty_pool_gives_an_empty_subset():
    for policy in POLICIES:
        rows = {key: values[:0] for key, values in pool().items()}
        assert len(choose(rows, ("rows", 3), policy=policy)) == 0


# quotas


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.integers(0, 200),
    st.sampled_from(["proportional", "equal"]),
)
def test_shares_sum_to_the_budget_and_fit_their_groups(sizes, budget, quota):
    out = shares(np.array(sizes), budget, quota)
    assert out.sum() == min(budget, sum(sizes)) and (out >= 0).all() and (out <= sizes).all()
    if quota == "proportional":
        assert (np.abs(out - min(budget, sum(sizes)) * np.array(sizes) / max(1, sum(sizes))) < 1).all()
    else:
        unfilled = out[out < sizes]
        assert len(unfilled) == 0 or np.ptp(unfilled) <= 1 and unfilled.min() >= out.max() - 1


def test_quotas_by_hand():
    scores, ids = np.arange(10.0), [str(i) for i in range(10)]
    groups = np.array(["small"] * 2 + ["large"] * 8)  # the large group has the best scores

    def numbers(quota, **more):
        chosen = select(scores, ids, ("rows", 5), spec=spec(quota=quota, **more), groups=groups)
        return chosen.tolist()

    assert numbers("none") == [9, 8, 7, 6, 5]
    assert numbers("proportional") == [9, 8, 7, 6, 1]
    assert numbers("equal") == [9, 8, 7, 1, 0]
    assert numbers("floor", quota_floor=0.4) == [9, 8, 7, 1, 0]
    assert numbers("floor", quota_floor=0.2) == [9, 8, 7, 6, 1]
    assert numbers("floor", quota_floor=0.3) == [9, 8, 7, 1, 0]  # 1.5 rows: at least that, so two
    assert numbers("floor", quota_floor=0.5) == [9, 8, 7, 1, 0]  # 2.5 and 2.5 would be six of five: two each are kept
    with pytest.raises(RecipeError, match="quota_floor 0.6 for 2 groups"):
        numbers("floor", quota_floor=0.6)


def test_a_floor_no_row_can_fill_is_given_to_the_others():
    chosen = select(
        np.array([3.0, 2.0, 1.0]),
        ["a", "b", "c"],
        ("tokens", 20),
        spec=spec(quota="floor", quota_floor=0.5),
        groups=["x", "x", "y"],
        n_tokens=np.array([8, 9, 15]),
    )
    assert chosen.tolist() == [0, 1]  # y is owed 10 tokens, but its only row costs 15 and no longer fits


# round-robin and sampling


def test_round_robin_lets_each_task_take_its_best():
    per_task = np.array([[9.0, 0.0], [8.0, 7.0], [7.0, 6.0], [0.0, 9.0], [0.0, 1.0]])
    ids = list("abcde")
    chosen = select(per_task.max(axis=1), ids, ("rows", 5), spec=spec(policy="round_robin"), per_task=per_task)
    assert chosen.tolist() == [0, 3, 1, 2, 4]  # a, then task 2's d; b is left for task 1, c for task 2


def test_sampling_goes_from_top_k_to_random_with_temperature():
    rng = np.random.default_rng(0)
    scores, ids = rng.normal(size=300), np.array([f"{i}" for i in range(300)], dtype=object)
    top = set(select(scores, ids, ("rows", 30)).tolist())
    overlap = {}
    for temperature in (1e-4, 0.5, 100.0):
        draws = [
            select(scores, ids, ("rows", 30), spec=spec(policy="sample", temperature=temperature), seed=s)
            for s in range(20)
        ]
        overlap[temperature] = np.mean([len(top & set(d.tolist())) / 30 for d in draws])
        assert (draws[0].tolist() != draws[1].tolist()) == (temperature > 0.01)
    assert overlap[1e-4] == 1 and 0.2 < overlap[0.5] < 0.9 and abs(overlap[100.0] - 0.1) < 0.05
    assert np.isfinite(soft_scores(np.ones(3), ["a", "b", "c"], temperature=1, seed=0)).all()


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=15))
def test_percentiles_keep_order_and_ties(scores):
    p = percentile(np.array(scores, float))
    assert p.min() >= 0 and p.max() <= 1
    for i, j in combinations(range(len(scores)), 2):
        assert np.sign(p[i] - p[j]) == np.sign(scores[i] - scores[j])


# duplicates

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


# diverse


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
