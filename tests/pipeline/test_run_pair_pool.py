"""Preference rows as a pool: both sides are kept, scored and trained on, and come back as they went in."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rich.console import Console  # noqa: E402

from conftest import random_rows, save_tiny, tiny_lora, tiny_model  # noqa: E402
from keepset.data import load_pool, write_subset  # noqa: E402
from keepset.errors import DataError, RecipeError  # noqa: E402
from keepset.features.adam import map_gradient  # noqa: E402
from keepset.features.influence import pair_influence  # noqa: E402
from keepset.model.pair_losses import pair_loss  # noqa: E402
from keepset.pipeline import run_recipe  # noqa: E402
from keepset.recipe import DataSpec, parse_recipe  # noqa: E402
from slow_gradients import flat, gradient, random_state, shapes_of, some_target, token_logps  # noqa: E402  # noqa: E402
from tiny_recipe import write_lines  # noqa: E402
from tolerance import FORWARD, MAPPED, condition  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def twin(peft, pair, names, loss, beta):
    """One pair's loss and its gradient, by autograd, one row at a time."""
    with torch.no_grad(), peft.disable_adapter():
        reference = tuple(token_logps(peft, side).sum()[None] for side in pair)
    counts = tuple(torch.tensor([float(side.supervised.sum())]) for side in pair)

    def value():
        policy = tuple(token_logps(peft, side).sum()[None] for side in pair)
        return pair_loss(loss, policy, reference, counts, beta=beta)[0]

    sums = [token_logps(peft, side).sum()[None].detach().requires_grad_() for side in pair]
    leaves = [*sums, *(r.clone().requires_grad_() for r in reference)]
    again = pair_loss(loss, tuple(leaves[:2]), tuple(leaves[2:]), counts, beta=beta)[0]
    return float(value().detach()), gradient(peft, names, value), condition(again, *leaves)


@pytest.mark.parametrize(
    ("loss", "kind"), [("dpo", "adam"), ("davir", "sgd"), ("dpo_mean", "precondition"), ("simpo", "adam")]
)
def test_influence_of_pairs_against_one_at_a_time_autograd(loss, kind):
    peft, rows = tiny_lora(tiny_model("llama")), random_rows(10, seed=3, prefix=5)
    pairs = [(rows[2 * i], rows[2 * i + 1]) for i in range(5)]
    target = some_target(peft)
    state, names = random_state(shapes_of(target)), list(target.blocks)
    found = pair_influence(peft, pairs, target, loss=loss, beta=0.7, adam=state, map=kind, token_budget=60)
    vectors = np.stack([flat({n: b[k] for n, b in target.blocks.items()}) for k in range(target.n_targets)])
    for i, pair in enumerate(pairs):
        value, gradient, times = twin(peft, pair, names, loss, 0.7)  # a small loss of large sums has few digits
        mapped = flat({n: map_gradient(kind, state, n, gradient[n]) for n in names})
        assert found.loss[i] == pytest.approx(value, rel=FORWARD * times)
        assert found.norms[i] == pytest.approx(np.linalg.norm(mapped), rel=MAPPED + FORWARD * times)
        assert np.abs(found.dots[i] - vectors @ mapped).max() <= (MAPPED + FORWARD * times) * np.linalg.norm(mapped)
    assert found.grad_norms.min() > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    save_tiny(folder / "model", max_position_embeddings=512)
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(["the", "answer", "user", "thing", "helpful"], n))

    def pairs(n, name):
        return [{"prompt": f"{name}{i} {text(2)}", "chosen": text(3 + i % 4), "rejected": f"{text(3)} x", "note": i}
                for i in range(n)]  # fmt: skip

    pool = [*pairs(20, "p"), {"prompt": "q", "chosen": "only one"}, {"prompt": "same", "chosen": "a", "rejected": "a"}]
    return {"model": str(folder / "model"), "pool": write_lines(folder / "pool.jsonl", pool),
            "target": write_lines(folder / "target.jsonl", [{"task": "t", **r} for r in pairs(4, "t")]),
            "pairs": write_lines(folder / "eval.jsonl", pairs(6, "e"))}  # fmt: skip


def test_pool_of_pairs(files, tmp_path):
    pool = load_pool(DataSpec(path=files["pool"], pairs=True))
    assert len(pool) == 20 and [q.reason for q in pool.quarantine] == ["missing-column", "identical-pair"]
    prompt, chosen, rejected = next(iter(pool.all_pairs()))
    first = json.loads(open(files["pool"]).readline())
    assert [m[0]["content"] for m in (prompt, chosen, rejected)] == [first[k] for k in ("prompt", "chosen", "rejected")]
    assert pool.messages(0) == prompt + chosen and pool.take([3, 1]).has_pairs
    assert set(pool.ids).isdisjoint(load_pool(files["pool"]).ids)  # the id is of both sides
    out = tmp_path / "subset.jsonl"
    write_subset(pool, [4, 2], out)
    lines = open(files["pool"]).read().splitlines()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [json.loads(lines[i]) for i in (4, 2)]
    with pytest.raises(DataError, match="all or none"):
        load_pool([DataSpec(path=files["pool"], pairs=True), DataSpec(path=files["pairs"])])


def recipe(files, run_dir, **more):
    train = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    return parse_recipe({
        "run_dir": str(run_dir), "model": {"model_name_or_path": files["model"], "max_length": 256, "device": "cpu"},
        "lora": {"lora_r": 2}, "pool": [{"path": files["pool"], "pairs": True}], "target": files["target"],
        "methods": [{"name": "davir", "label": "margin", "options": {"side": "margin"}}, "rose", "length"],
        "budget": 5, "train": {**train, "loss": "davir"}, "reference": train,
        "warmup": {**train, "loss": "dpo", "min_rows": 6}, "evaluate": {"pairs": [{"path": files["pairs"]}]},
        "controls": {"random_seeds": [0], "longest": False}, **more,
    })  # fmt: skip


def test_pairs_are_scored_selected_and_trained_on(files, tmp_path):
    quiet = Console(quiet=True)
    job = run_recipe(recipe(files, tmp_path / "run"), console=quiet, out=quiet)
    table = job.run.load_table("scores/margin.parquet").to_pydict()
    assert np.allclose(table["score"], np.subtract(table["chosen"], table["rejected"]))
    assert np.allclose(table["rejected"], 1 - np.divide(table["loss_ref.rejected"], table["loss_ini.rejected"]))
    # the reference learnt the chosen sides
    assert np.mean(table["chosen"]) > 0 and job.n_tokens()[0] == sum(s.supervised.sum() for s in job.sides[1][0])
    assert json.loads((job.run.path / "models/rose-seed0/training.json").read_text())["losses"][0] == pytest.approx(
        np.log(2), abs=4 * FORWARD
    )
    before = {p: p.stat().st_mtime_ns for p in (job.run.path / "models").rglob("*.safetensors")}
    run_recipe(recipe(files, tmp_path / "run"), console=quiet, out=quiet)
    assert {p: p.stat().st_mtime_ns for p in (job.run.path / "models").rglob("*.safetensors")} == before


def test_mistakes_are_told(files, tmp_path):
    quiet = Console(quiet=True)
    plain = recipe(files, tmp_path / "a", pool=[{"path": files["pairs"]}], methods=["random"])
    with pytest.raises(RecipeError, match=r"train\.loss: davir trains on pairs"):
        run_recipe(plain, console=quiet, out=quiet)
    one_sided = recipe(files, tmp_path / "b", pool=[{"path": files["pairs"]}], train={}, warmup={})
    with pytest.raises(RecipeError, match="side: the rejected sides"):
        run_recipe(one_sided, console=quiet, out=quiet)
