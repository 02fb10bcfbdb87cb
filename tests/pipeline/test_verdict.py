"""Quality against cost, curves, nested shots, and validation loss against performance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from keepset.data import load_target
from keepset.pipeline.verdict import budget_curves, loss_against_performance, means_of, pareto, print_verdict
from keepset.recipe import DataSpec, MethodSpec


def entry(label, value, flops, *, kind="method", budget="5%", n_rows=5, loss=1.0):
    return {
        "label": label, "kind": kind, "budget": budget, "n_rows": n_rows, "seeds": 1,
        "metrics": {"accuracy.policy_mean": {"value": value, "low": 0, "high": 1}, "loss.chosen": {"value": loss}},
        "cost": {"select_flops": flops, "train_flops": 1.0, "select_seconds": 2.0, "train_seconds": 1.0},
    }  # fmt: skip


def test_front_is_what_nothing_cheaper_beats():
    summary = [entry("base", 0.5, -1), entry("random", 0.6, 0), entry("rose", 0.7, 10), entry("less", 0.65, 20),
               entry("twin", 0.7, 10), entry("dear", 0.7, 30)]  # fmt: skip
    rows = pareto(summary, "accuracy.policy_mean")
    assert [r["label"] for r in rows] == ["base", "random", "rose", "twin", "less", "dear"]
    assert [r["label"] for r in rows if r["front"]] == ["base", "random", "rose", "twin"]
    assert rows[2]["flops"] == 11 and rows[2]["seconds"] == 3
    assert [r["label"] for r in pareto(summary, "accuracy.policy_mean", -1) if r["front"]] == ["base"]


def test_curves_over_budgets():
    summary = [entry(f"rose@{b}", v, 1, budget=b, n_rows=n) for b, v, n in (("10%", 0.7, 10), ("5%", 0.6, 5))]
    summary += [entry("random", 0.5, 0, kind="random", budget=b, n_rows=n) for b, n in (("5%", 5), ("10%", 10))]
    summary.append(entry("full", 0.8, 0, kind="full", budget="100%", n_rows=100))
    curves = budget_curves(summary, "accuracy.policy_mean")
    assert {k: [p["value"] for p in v] for k, v in curves.items()} == {"rose": [0.6, 0.7], "random": [0.5, 0.5]}


def test_loss_against_performance_by_known_ranks():
    def point(model, loss, accuracy):
        return {"model": model, "metrics": {"loss.chosen": loss, "accuracy.policy_mean": accuracy}}

    # inside each model lower loss is better; over models the one with the higher loss is better
    points = [point("a", 1.0 - 0.1 * k, 0.5 + 0.01 * k) for k in range(3)]
    points += [point("b", 3.0 - 0.1 * k, 0.9 + 0.01 * k) for k in range(3)]
    (found,) = loss_against_performance(points)
    assert found["n"] == 6 and found["within"] == pytest.approx(-1) and found["spearman"] > 0
    assert loss_against_performance(points[:2]) == []
    assert loss_against_performance([point("a", x, 0.5) for x in range(4)]) == []  # nothing varies


def test_shots_of_a_target_are_the_recipes_own_draw(tmp_path):
    rows = [{"task": "ab"[i % 2], "prompt": f"p{i}", "chosen": "x", "rejected": f"r{i}"} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    whole, before = load_target(tmp_path / "t.jsonl"), set()
    for n in (1, 3, 5, 10):
        few = whole.shots(n, seed=4)
        assert set(few.ids) == set(load_target(DataSpec(path=str(tmp_path / "t.jsonl"), shots=n), seed=4).ids)
        assert before <= set(few.ids) and len(few) == 2 * n
        before = set(few.ids)
    assert set(whole.shots(3, seed=5).ids) != set(whole.shots(3, seed=4).ids)
    assert "shots" not in MethodSpec(name="rose").key() and MethodSpec(name="rose", shots=2).key()["shots"] == 2


def test_epochs_shots_and_checkpoints_in_a_run(tmp_path):
    pytest.importorskip("torch")
    from conftest import save_tiny
    from keepset.pipeline import run_recipe
    from keepset.recipe import parse_recipe

    save_tiny(tmp_path / "model", max_position_embeddings=512)
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(["the", "answer", "user", "thing", "helpful"], n))

    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    def pairs(n, name):
        return [{"task": "ab"[i % 2], "prompt": f"{name}{i}", "chosen": text(4), "rejected": text(3)} for i in range(n)]

    train = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    recipe = parse_recipe({
        "run_dir": str(tmp_path / "run"), "lora": {"lora_r": 2}, "seed": 1,
        "model": {"model_name_or_path": str(tmp_path / "model"), "max_length": 256, "device": "cpu"},
        "pool": lines("pool.jsonl", [{"prompt": f"q{i}", "completion": text(3 + i % 4)} for i in range(16)]),
        "target": lines("target.jsonl", pairs(8, "t")), "budget": 4,
        "methods": ["rose", {"name": "rose", "label": "rose-1-shot", "shots": 1},
                    {"name": "rose", "label": "rose-last", "options": {"last": 1}}],
        "train": train, "warmup": {**train, "num_train_epochs": 2, "min_rows": 6},
        "evaluate": {"pairs": [{"path": lines("eval.jsonl", pairs(8, "e"))}], "each_epoch": True, "bootstrap": 100},
        "controls": {"random_seeds": [0], "longest": False},
    })  # fmt: skip
    quiet = Console(quiet=True)
    job = run_recipe(recipe, console=quiet, out=quiet)
    result = job.run.load_json("comparison.json")
    points = [p for f in (job.run.path / "epochs").glob("*/points.json") for p in json.loads(f.read_text())]
    made = json.loads((job.run.path / "manifest.json").read_text())["files"]  # what `reproduce` compares
    assert {f"epochs/{p['model']}/points.json" for p in points} == {name for name in made if name.startswith("epochs/")}
    models = {p["model"] for p in points}
    assert len(models) == 4 and len(points) == 12
    last = {p["model"]: p for p in points if p["epoch"] == 3}
    for row in means_of(result["rows"])[1:]:
        assert last[row["model"]]["metrics"]["loss.chosen"] == pytest.approx(row["metrics"]["loss.chosen"])
    found = {r["metric"]: r for r in result["loss_vs_performance"]["epochs"]}
    assert found["margin.implicit_mean"]["n"] == 12 and -1 <= found["margin.implicit_mean"]["within"] <= 1
    assert {m["n"] for m in result["loss_vs_performance"]["models"]} == {5}
    assert set(result["pareto"]) >= {"accuracy.policy_mean", "loss.chosen"}
    for entry in result["summary"]:  # two tasks of four pairs each make the whole
        for metric in ("accuracy.policy_mean", "loss.chosen"):
            by_task = [entry["metrics"][f"{metric}.of.{task}"] for task in "ab"]
            assert [t["n"] for t in by_task] == [4, 4]
            assert np.mean([t["value"] for t in by_task]) == pytest.approx(entry["metrics"][metric]["value"])
    tables = {k: job.run.load_table(f"scores/{k}.parquet").to_pydict() for k in ("rose", "rose-1-shot", "rose-last")}
    assert not np.allclose(tables["rose"]["score"], tables["rose-1-shot"]["score"])
    assert np.allclose(tables["rose-last"]["score"], tables["rose"]["ckpt1.cosine"])  # one checkpoint: its own cosine
    screen = Console(record=True, width=100, file=open("/dev/null", "w"))
    print_verdict(result, screen)
    shown = screen.export_text()
    assert "rose-1-shot" in shown and "front" in shown and "over models and their epochs" in shown
    assert "accuracy.policy_mean by task" in shown
