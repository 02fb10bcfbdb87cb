"""Choosing rows: budgets, ties, quotas, round-robin, sampling, duplicates, MMR and facility location."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepset.errors import RecipeError
from keepset.methods.perplexity import percentile
from keepset.recipe import SelectSpec
from keepset.selection.ranking import rank_order, soft_scores
from keepset.selection.select import select

POLICIES = ["top_k", "round_robin", "knn_kde", "transport", "mmr", "facility_location", "sample"]
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
        (("rows", 1), {"policy": "transport"}, "policy 'transport' needs a method that scores rows by task"),
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
