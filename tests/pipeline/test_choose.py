"""Every selection policy, quota and removal of copies from a recipe, through scores on disk, without a model."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
from rich.console import Console

from keepset.errors import DataError, RecipeError
from keepset.pipeline.choose import choose, chosen_places
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec, parse_recipe
from keepset.row_ids import Ids
from keepset.stages.job import Job

WORDS = "sum apple river add three seven paint minus equals cloud dog cat run code loop".split()
POLICIES = ["top_k", "round_robin", "knn_kde", "transport", "mmr", "facility_location", "sample"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of 30 and 10 rows (the last three of the first nearly the same), a target of two tasks."""
    path = tmp_path_factory.mktemp("policies")
    rng = np.random.default_rng(0)

    def row(n):
        return {"prompt": " ".join(rng.choice(WORDS, 6)), "completion": " ".join(rng.choice(WORDS, n))}

    large, long = [row(3 + i % 9) for i in range(27)], " ".join(rng.choice(WORDS, 80))
    large += [{"prompt": "add three seven", "completion": f"{long} {end}"} for end in ("a", "b", "c")]
    goals = [{"task": t, "prompt": p, "chosen": "x", "rejected": "y"}
             for t, p in (("sums", "add three and seven"), ("sums", "sum minus"), ("pets", "cat dog"))]  # fmt: skip
    for name, rows in (("large", large), ("small", [row(5) for _ in range(10)]), ("target", goals)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def chosen(folder, run_dir, method="bm25", budget="8", **select):
    job = Job(
        parse_recipe(
            {
                "run_dir": str(run_dir),
                "pool": [str(folder / "large.jsonl"), str(folder / "small.jsonl")],
                "target": str(folder / "target.jsonl"),
                "methods": [method],
                "select": select,
                "budget": budget,
            }
        ),
        console=Console(file=io.StringIO()),
        text_only=True,
    )
    score(job, job.recipe.methods[0])
    subset = choose(job, job.recipe.methods[0].label, budget)
    sources = Counter(np.asarray(job.pool.sources(), dtype=str)[job.usable[subset.indices]])
    return [str(i) for i in subset.ids(job)], sources, subset.n_tokens


def options(wanted, **of):
    """The options that count under a policy or quota; others are refused."""
    needed = {"diversity": ("mmr", "facility_location"), "quota_floor": ("floor",), "transport_reg": ("transport",)}
    return {name: value for name, value in of.items() if wanted in needed[name]}


def test_every_policy_gives_its_own_rows(folder, tmp_path):
    found = {
        p: chosen(folder, tmp_path / p, policy=p, **options(p, diversity=0.8, transport_reg=0.3))[0] for p in POLICIES
    }
    assert all(len(set(ids)) == 8 for ids in found.values())
    assert len({tuple(ids) for ids in found.values()}) == len(POLICIES)


@pytest.mark.parametrize("policy, unit", product(POLICIES, ["rows", "tokens"]))
def test_quotas_hold_under_every_policy(policy, unit, folder, tmp_path):
    budget = "8" if unit == "rows" else "90 tokens"
    for quota in ("proportional", "equal", "floor"):
        ids, sources, tokens = chosen(
            folder, tmp_path / quota, policy=policy, quota=quota, budget=budget, **options(quota, quota_floor=0.25)
        )
        if unit == "tokens":
            assert 0 < tokens <= 90
        elif quota == "floor":
            assert len(ids) == 8 and sources["small"] >= 2 and sources["large"] >= 2
        else:
            assert sources == ({"large": 6, "small": 2} if quota == "proportional" else {"large": 4, "small": 4})


def test_near_copies_leave_one_and_temperature_and_queries_reach_the_choice(folder, tmp_path):
    kept = chosen(folder, tmp_path / "all", budget="40")[0]
    distinct = chosen(folder, tmp_path / "near", budget="40", dedup="near")[0]
    assert len(kept) == 40 and len(distinct) == 38 and set(distinct) < set(kept)
    # DSIR's scores have no ties, which a cold draw would break by chance
    cold = chosen(folder, tmp_path / "cold", "dsir", policy="sample", temperature=1e-6)[0]
    hot = chosen(folder, tmp_path / "hot", "dsir", policy="sample", temperature=100.0)[0]
    assert cold == chosen(folder, tmp_path / "top", "dsir")[0] != hot


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("bm25", {"query": "prompt"}, {"query": "prompt+chosen"}),
        ("dsir", {"gumbel": True}, {"gumbel": False}),
        ("dsir", {"seed": 0}, {"seed": 1}),
        ("dsir", {"by_task": False}, {"by_task": True}),
        ("length", {"prefer": "long"}, {"prefer": "short"}),
    ],
)
def test_options_of_text_methods_change_the_scores(name, one, other, folder, tmp_path):
    # "chosen" answers that share words with the pool, so that they can matter
    target = folder / "target.jsonl"
    if name == "bm25":
        rows = [json.loads(line) | {"chosen": "river cloud paint"} for line in target.read_text().splitlines()]
        target = tmp_path / "target.jsonl"
        target.write_text("".join(json.dumps(r) + "\n" for r in rows))
    methods = [{"name": name, "label": label, "options": o} for label, o in (("one", one), ("other", other))]
    pool, run_dir = str(folder / "large.jsonl"), str(tmp_path / "run")
    recipe = {"pool": pool, "target": str(target), "run_dir": run_dir, "methods": methods}
    job = Job(parse_recipe(recipe), console=Console(file=io.StringIO()), text_only=True)
    a, b = (score(job, m)["score"].to_numpy() for m in job.recipe.methods)
    assert not np.array_equal(a, b)


def test_a_policy_that_needs_tasks_says_so(folder, tmp_path):
    with pytest.raises(RecipeError, match="scores rows by task"):
        chosen(folder, tmp_path, method="random", policy="round_robin")
    assert MethodSpec(name="random").label == "random"


def test_a_chosen_row_that_the_pool_has_lost_is_named_in_one_line():
    ids = Ids(np.array([1, 2], np.uint64), np.array([0, 0], np.uint64))
    assert chosen_places(ids, [ids[1], ids[0]], "rose").tolist() == [1, 0]
    with pytest.raises(DataError, match=f"rose: row {'f' * 32} is not in the pool any more") as caught:
        chosen_places(ids, [ids[0], "f" * 32], "rose")
    assert "\n" not in str(caught.value)
