"""docs/theory.md, section 7: each method's operations, bytes and connections, by hand and as counted or left on disk.

The measured growth from 1,000 to 50,000 rows is `benchmarks/growth.py`'s; what it wrote is held against the page here.
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

from safetensors.numpy import load_file

from conftest import random_rows, tiny_lora, tiny_model
from keepset.features.curvature import kronecker_factors
from keepset.features.gradient_store import GradientStore
from keepset.features.influence import Reducer
from keepset.features.targets import concatenate, target_vectors
from keepset.pipeline.price import selection_work
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec
from keepset.stages.job import Job
from keepset.train.warmup import pick_subset
from slow_gradients import random_state
from tiny_recipe import quiet, recipe, write_lines

ROOT = Path(__file__).parents[1]
W, V = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 320 * 32  # two blocks; the output head
P = 2 * 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))  # LoRA of rank 2 on q, k, v, o of two blocks
EPOCHS = CHECKPOINTS = 2  # of the warm-up
TASKS = 2
SHARING = 2  # targets of one map that the recipe names, ROSE's and LESS's, share the pass


def made(folder, model, n) -> Job:
    """A job of n rows, of which those 16 apart have the same words but one."""
    words = ["the", "answer", "is", "user", "thing", "wants"]
    pool = [{"instruction": f"q{i:03d}", "input": "", "output": " ".join(words[: 1 + i % 6])} for i in range(n)]
    pairs = [{"task": "ab"[i % 2], "prompt": f"p{i}", "chosen": "the answer", "rejected": "the"} for i in range(4)]
    files = {"pool": pool, "target": pairs, "pairs": pairs, "rows": pool[:2]}
    data = {name: write_lines(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    names = [*FORMULAS, "bm25", "dsir", "random", "length"]
    return Job(recipe(model, data, folder / "run", methods=names), console=quiet())


def size(rows) -> tuple[int, int]:
    return sum(len(r.input_ids) for r in rows), sum(int(r.supervised.sum()) for r in rows)


def forward(rows) -> float:
    """F: 2 (W τ + V s)."""
    tokens, supervised = size(rows)
    return 2 * (W * tokens + V * supervised)


def warm_up(job) -> float:
    picked = pick_subset(job.ids, job.recipe.warmup.fraction, job.recipe.seed, min_rows=job.recipe.warmup.min_rows)
    return 2 * EPOCHS * forward([job.rows[i] for i in picked])


def answers(job) -> float:
    supervised = size(job.rows)[1]
    return 2 * (W * (supervised + len(job.rows)) + V * supervised)


def goals(job, sides=1) -> float:
    return forward([side for pair in job.target_pairs[0] for side in pair[:sides]])


def states(job) -> float:
    """Hidden states of the pool and of the target's chosen sides, without the head."""
    return 2 * W * (size(job.rows)[0] + size([pair[0] for pair in job.target_pairs[0]])[0])


def curvature(job) -> float:
    return forward(job.rows)  # the pool is smaller than the 64 rows that are drawn


FORMULAS = {
    "perplexity": lambda job: forward(job.rows),
    "loss": lambda job: forward(job.rows),
    "el2n": lambda job: forward(job.rows),
    "ifd": lambda job: forward(job.rows) + answers(job),
    "rds": states,
    "rds+": states,
    "knn-shapley": states,
    "davir": lambda job: 2 * forward(job.rows) + 2 * forward(job.rows),  # both models; one epoch of training
    "davir-ref": lambda job: 4 * forward(job.rows),
    "rho-sum": lambda job: 4 * forward(job.rows),
    "rho-mean": lambda job: 4 * forward(job.rows),
    "instructdiff": lambda job: 4 * forward(job.rows),
    "forgetting": lambda job: (1 + CHECKPOINTS) * forward(job.rows) + warm_up(job),
    "tracin": lambda job: 2 * CHECKPOINTS * (forward(job.rows) + goals(job)) + warm_up(job),
    "grad-cosine": lambda job: 2 * CHECKPOINTS * (forward(job.rows) + goals(job)) + warm_up(job),
    "less": lambda job: 2 * CHECKPOINTS * (forward(job.rows) + goals(job)) + warm_up(job),
    "rose": lambda job: 2 * CHECKPOINTS * (forward(job.rows) + goals(job, sides=2)) + warm_up(job),
    "influence": lambda job: 2 * (forward(job.rows) + goals(job) + curvature(job)) + warm_up(job),
    "datainf": lambda job: 2 * (forward(job.rows) + goals(job) + 2 * curvature(job)) + warm_up(job),
    "ekfac": lambda job: 2 * (forward(job.rows) + goals(job) + 2 * curvature(job)) + warm_up(job),
    "metagradient": lambda job: 8 * forward(job.rows) + 3 * goals(job, sides=2),  # one epoch
    "in-run-shapley": lambda job: 2 * (forward(job.rows) + 2 * goals(job)) + warm_up(job),  # one step holds this pool
}


@pytest.fixture(scope="module")
def job(model_folder, tmp_path_factory) -> Job:
    return made(tmp_path_factory.mktemp("cost"), model_folder, 16)


def test_7_1_operations_are_those_of_the_formulas_and_grow_with_the_tokens(job, model_folder, tmp_path):
    twice = made(tmp_path, model_folder, 32)
    assert size(twice.rows)[0] == pytest.approx(2 * size(job.rows)[0], rel=0.05)
    for name, formula in FORMULAS.items():
        for one in (job, twice):
            counted = sum(w.flops for w in selection_work(one, [MethodSpec(name=name)]))
            assert counted == pytest.approx(formula(one), rel=1e-12), name
    for name in ("bm25", "dsir", "random", "length"):
        assert selection_work(job, [MethodSpec(name=name)]) == []


@pytest.fixture(scope="module")
def scored(job) -> Job:
    """Text, forward, reference and gradient methods, scored where every connection is refused."""

    def refuse(*_):
        raise ConnectionError("choosing must not need a network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        for name in ("bm25", "dsir", "rds", "davir", "rose"):
            score(job, MethodSpec(name=name))
    return job


def on_disk(job, stage) -> list[dict[str, np.ndarray]]:
    return [load_file(p) for p in sorted(job.run.path.glob(f"work/{stage}/*/*.safetensors"))]


def test_7_2_what_lies_on_disk_is_what_the_formulas_say(scored):
    n = len(scored.rows)

    def held(stage):
        return sum(a.nbytes for shard in on_disk(scored, stage) for a in shard.values())

    assert held("losses-base") == held("losses-reference") == 16 * n
    assert held("representations-last") == 4 * 32 * n
    assert held("influence-*-checkpoint-*") == 8 * (TASKS + 2) * n * CHECKPOINTS * SHARING
    vectors = [a for shard in on_disk(scored, "target-checkpoint-*") for k, a in shard.items() if k.startswith("block")]
    assert sum(v.nbytes for v in vectors) == 4 * P * TASKS * CHECKPOINTS * SHARING
    moments = [load_file(p) for p in scored.run.path.glob("models/warmup/checkpoint-*/adam.safetensors")]
    assert len(moments) == CHECKPOINTS and all(sum(a.nbytes for a in m.values()) == 8 * P for m in moments)
    (reference,) = scored.run.path.glob("models/reference/adapter_model.safetensors")
    assert sum(a.nbytes for a in load_file(reference).values()) == 4 * P


def test_7_2_a_store_takes_two_bytes_a_number_and_20_a_row(tmp_path):
    n, dim, sizes = 10, 64, []
    store = GradientStore.create(tmp_path / "store", {"model": "m"}, dim=dim)
    for number, m in enumerate((n, 2 * n)):
        store.write([f"{i:032x}" for i in range(m)], np.ones((m, dim), np.float32), np.ones(m), np.zeros(m))
        files = sum((tmp_path / "store" / f"{number:05d}.{kind}").stat().st_size for kind in ("safetensors", "json"))
        sizes.append(files - m * (2 * dim + 20))
    assert all(500 < size < 600 for size in sizes) and abs(sizes[1] - sizes[0]) <= 16  # a shard's head and record


def test_7_2_what_a_gradient_pass_and_ekfac_hold():
    peft, rows = tiny_lora(tiny_model("llama"), r=2), random_rows(6)
    pairs = [(row, None) for row in rows[:TASKS]]
    target = target_vectors(peft, pairs, np.arange(TASKS), loss="sft", reference="none")
    shapes = {n: tuple(b.shape[1:]) for n, b in target.blocks.items()}
    state, both = random_state(shapes), concatenate([target])
    sink = Reducer(shapes, both, state, "adam", next(peft.parameters()).device)
    held = [*target.blocks.values(), *both.blocks.values(), *state.exp_avg.values(), *state.exp_avg_sq.values()]
    held += [t for m in sink.maps.values() for t in (m.shift, m.base)] + list(sink.shared.values())
    held += list(sink.vectors.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(storages.values()) == 4 * P * (2 * TASKS + 5)
    assert sink.buffer.nbytes + sink.scratch.nbytes == 8 * 2**20
    factors = kronecker_factors(peft, rows, token_budget=256, labels="data", seed=0)
    squares = sum(a * a + b * b for a, b in shapes.values())
    assert sum(f.nbytes for pair in factors.values() for f in pair) == 8 * squares  # then 8 of bases, 4 turned


def test_7_3_choosing_opens_no_connection(scored):
    assert {p.stem for p in (scored.run.path / "scores").glob("*.parquet")} == {"bm25", "dsir", "rds", "davir", "rose"}


def test_7_4_the_growth_that_was_measured_is_that_of_the_formulas_and_of_the_page():
    results = json.loads((ROOT / "benchmarks/results/growth.json").read_text())
    growth, details = results["growth"], results["details"]
    linear = set(growth) - {"mmr", "facility_location"}
    assert set(FORMULAS) >= {name for name in growth if "flops" in growth[name]} >= {"davir", "rose", "rds"}
    for name in linear:
        assert growth[name]["to"] == 50_000
        assert growth[name]["cpu_seconds"]["exponent"] < 1.15, name
        if "flops" in growth[name]:
            assert growth[name]["flops"]["exponent"] == pytest.approx(1, abs=0.04), name
    below = [details["facility_location"][n]["cpu_seconds"] for n in ("1000", "10000")]
    assert growth["mmr"]["cpu_seconds"]["exponent"] == pytest.approx(2, abs=0.15)
    assert np.log10(below[1] / below[0]) == pytest.approx(2, abs=0.15)
    page = (ROOT / "docs/theory.md").read_text()
    for name, one in growth.items():
        assert re.search(rf"\| `{name}` \|.* {one['cpu_seconds']['exponent']:.2f}", page), name


def test_every_statement_of_the_page_has_its_test():
    stated = set(re.findall(r"^\*\*(\d\.\d)", (ROOT / "docs/theory.md").read_text(), flags=re.MULTILINE))
    tests = "".join((ROOT / f"tests/{name}.py").read_text() for name in ("test_theory", "test_theory_cost"))
    assert stated == {number.replace("_", ".") for number in re.findall(r"def test_(\d_\d)_", tests)}
