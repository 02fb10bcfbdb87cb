"""`keepset plan --gpus` of a model that nobody has here: an 8B configuration without weights, and a tiny tokenizer."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from conftest import tiny_tokenizer
from keepset.cli import app
from keepset.errors import RecipeError
from keepset.methods.table import METHODS, needs_model
from keepset.pipeline.cluster import Cluster
from keepset.pipeline.cluster_counts import Counts
from keepset.pipeline.plan_cluster import plan_cluster, print_cluster
from keepset.pipeline.price import users_of
from keepset.pipeline.score import score
from keepset.stages.encoding import NAME
from keepset.stages.job import Job
from keepset.stages.stage import Sweep
from tiny_recipe import TRAIN, quiet, recipe, write_lines

BLOCKS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # q, o; k, v; gate, up, down
HEAD = 4096 * 128256
NODE = Cluster("h100", gpus=8, price=2.0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    return folder


def wanted(large, data, tmp_path, **more):
    made = recipe(large, data, tmp_path / "run", methods=["bm25", "rds", "davir", "rose"], **more)
    return made.model_copy(update={"model": made.model.model_copy(update={"dtype": "bfloat16"})})


def steps(plan):
    return {step["stage"]: step for step in plan["steps"]}


def test_an_8b_model_by_hand(large, data, tmp_path):
    made = wanted(large, data, tmp_path)
    counts = Counts(made, None, quiet())
    n_tokens, n_head = (int(c.sum()) for c in counts.job.encoded.counts())
    plan = plan_cluster(made, NODE, console=quiet())
    by = steps(plan)
    rate = 0.35 * 989e12
    trained = 2 * 2 * (BLOCKS * n_tokens + HEAD * n_head)  # forward, and backward through frozen weights
    assert by["train the reference"]["flops"] == pytest.approx(trained)
    assert by["train the reference"]["seconds"] == pytest.approx(trained / rate + 10)
    lost = by["losses under the base"]  # 22 rows in shards of 8: the longest worker has one of three
    assert lost["flops"] == pytest.approx(trained / 2)
    assert lost["seconds"] == pytest.approx(trained / 2 / rate / 3)
    assert lost["disk"] == 22 * 16 and by["representations (last)"]["disk"] == 22 * 4096 * 4
    adapter = 4 * 32 * 2 * (4 * 4096 + 2 * (4096 + 1024))  # r = 2: q and o of d + d, k and v of d + d/4
    assert by["train the reference"]["disk"] == adapter
    assert by["warm-up"]["disk"] == 2 * 3 * adapter  # two epochs, each with Adam's moments
    assert plan["gpu_hours"] == pytest.approx(plan["total_seconds"] * 8 / 3600)
    assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert plan["network_bytes"] == 0  # one node


def test_weights_and_results_on_the_network(large, data, tmp_path):
    made = wanted(large, data, tmp_path)
    weights = 2 * (BLOCKS + 2 * HEAD + 65 * 4096)  # bfloat16: blocks, embedding, head, norms
    four = steps(plan_cluster(made, replace(NODE, nodes=4, network=100), console=quiet()))
    start = four["start, load the model"]
    assert start["network"] == 4 * weights
    assert start["seconds"] == pytest.approx(10 + 8 * weights / 100e9)
    counts = Counts(made, None, quiet())
    states = 22 * 4096 * 4
    assert four["representations (last)"]["network"] == pytest.approx(counts.token_bytes + states)
    local = steps(plan_cluster(made, replace(NODE, nodes=4, shared=False), console=quiet()))
    assert local["representations (last)"]["network"] == pytest.approx(4 * counts.token_bytes + states)
    assert local["read the pool"]["network"] == 0  # the files must be there


def test_more_gpus_are_never_slower_and_never_cheaper_than_the_work(large, data, tmp_path):
    made = wanted(large, data, tmp_path, evaluate={})
    for rows in (22, 270_000):
        plans = [plan_cluster(made, replace(NODE, gpus=k), rows=rows, console=quiet()) for k in (1, 2, 8, 64)]
        timed = [[s for s in plan["steps"] if s["flops"]] for plan in plans]
        for fewer, more in itertools.pairwise(timed):
            assert all(b["seconds"] <= a["seconds"] * (1 + 1e-9) for a, b in zip(fewer, more, strict=True))
        for plan, some in zip(plans, timed, strict=True):
            assert plan["gpu_hours"] * 3600 >= sum(s["flops"] for s in some) / (0.35 * 989e12)
            assert 0 < plan["busy"] <= 1


def test_a_training_stays_on_one_gpu_unless_the_recipe_says_otherwise(large, data, tmp_path):
    made = wanted(large, data, tmp_path, evaluate={}, reference={**TRAIN, "per_device_train_batch_size": 8})
    rows = 1_000_000
    one, many = (
        steps(plan_cluster(made, replace(NODE, gpus=k), rows=rows, console=quiet()))["train the reference"]
        for k in (1, 64)
    )
    assert one["seconds"] == many["seconds"] and many["how"] == "one process"
    shared = made.model_copy(update={"reference": made.reference.model_copy(update={"num_processes": 8})})
    eight = plan_cluster(shared, NODE, rows=rows, console=quiet())
    assert steps(eight)["train the reference"]["seconds"] == pytest.approx((one["seconds"] - 10) / 8 + 10)
    assert steps(eight)["train the reference"]["how"] == "8 processes"
    alone = plan_cluster(made, NODE, rows=rows, console=quiet())
    assert any("num_processes: 8" in note for note in alone["notes"])
    with pytest.raises(RecipeError, match="num_processes: 8, and a node has 4 GPUs"):
        plan_cluster(shared, replace(NODE, gpus=4), console=quiet())


def test_rows_stand_for_a_larger_pool_of_their_kind(model_folder, data, tmp_path):
    """The pool written three times with other numbers of the same length is what three times its rows stand for."""
    lines = [json.loads(line) for line in open(data["pool"])]
    lines = [row for row in lines if row["output"] and len(row["output"]) < 500]
    once = write_lines(tmp_path / "once.jsonl", [{**r, "instruction": f"0{r['instruction']}"} for r in lines])
    thrice = write_lines(
        tmp_path / "thrice.jsonl", [{**r, "instruction": f"{k}{r['instruction']}"} for k in range(3) for r in lines]
    )
    names = ["davir", "rds", "rose", "in-run-shapley"]
    more = {"evaluate": {}, "warmup": {**TRAIN, "fraction": 1.0}}  # no draw, so that the same rows are warmed up on
    small, whole = (
        plan_cluster(recipe(model_folder, {**data, "pool": pool}, tmp_path / run, methods=names, **more), NODE,
                     rows=3 * len(lines), console=quiet())
        for pool, run in ((once, "a"), (thrice, "b"))
    )  # fmt: skip
    for ours, theirs in zip(small["steps"], whole["steps"], strict=True):
        if ours["stage"].split(",")[0] != "in-run Shapley":  # its name tells its steps
            assert ours["stage"] == theirs["stage"]
            assert ours["flops"] == pytest.approx(theirs["flops"]) and ours["rows"] == theirs["rows"]
            assert ours["disk"] == pytest.approx(theirs["disk"], rel=0.01)


def test_bytes_are_those_that_a_run_leaves(model_folder, data, tmp_path):
    names = ["davir", "rose", "less", "rds", "knn-shapley"]
    made = recipe(model_folder, data, tmp_path / "run", methods=names, batching={"token_budget": 256})
    counts = Counts(made, None, quiet())
    job = Job(made, console=quiet())
    with job.run.lock():
        for spec in made.methods:
            score(job, spec)
    for stage in {s for users in users_of(job, made.methods).values() for s in users.stages}:
        if isinstance(stage, Sweep):
            folder, name = job.run.path / "work", stage.name(job)
            files = (folder / name).rglob("*.safetensors")
        else:
            kept = stage.kept(job)
            files = [p for p in (job.run.path / kept.folder).rglob("*.safetensors")]
        arrays = [a.nbytes for path in files for a in load_file(path).values()]
        assert sum(arrays) == pytest.approx(counts.kept(stage), rel=0.3), stage
    tokens = [a.nbytes for p in (job.run.path / "work" / NAME).rglob("*.safetensors") for a in load_file(p).values()]
    assert sum(tokens) == pytest.approx(counts.token_bytes, rel=0.3)


@pytest.mark.parametrize("name", [name for name in METHODS if needs_model(name)])
def test_every_method_can_be_planned(name, large, data, tmp_path):
    options = {"options": {"permutations": 2}} if name == "tmc-shapley" else {}
    made = recipe(large, data, tmp_path, methods=[{"name": name, **options}], evaluate={})
    plan = plan_cluster(made, replace(NODE, nodes=2), rows=1000, console=quiet())
    assert plan["total_seconds"] > 0 and any(s["flops"] for s in plan["steps"])


def test_a_measured_run_gives_the_rates(model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path / "run", methods=["davir"], evaluate={})
    run = tmp_path / "like"
    run.mkdir()
    lines = [
        {"stage": "train models/reference", "flops": 1e9, "seconds": 2.0, "cpu_seconds": 2.0},
        {"stage": "losses (base and reference)", "flops": 1e9, "seconds": 1.0, "cpu_seconds": 1.0},
    ]
    write_lines(run / "costs.jsonl", lines)
    plan = plan_cluster(made, Cluster("mine", gpus=2), rows=22_000, like=run, console=quiet())
    by = steps(plan)
    assert by["train the reference"]["seconds"] == pytest.approx(by["train the reference"]["flops"] / 0.5e9)
    rounds = -(-22_000 // 8 // -1) * 0 + 2750 / 2  # shards of 8 rows, two workers
    assert by["losses under the base"]["seconds"] == pytest.approx(
        by["losses under the base"]["flops"] / 1e9 * rounds / 2750
    )
    write_lines(run / "costs.jsonl", lines[1:])
    with pytest.raises(RecipeError, match="measured no training, which 'train the reference' needs"):
        plan_cluster(made, Cluster("mine"), like=run, console=quiet())


def test_gpus_for_text_methods_alone_are_refused(large, data, tmp_path):
    made = recipe(large, data, tmp_path / "run", methods=["bm25"], evaluate={})
    with pytest.raises(RecipeError, match="nothing in this recipe runs a model"):
        plan_cluster(made, NODE, console=quiet())


def test_what_breaks_first_is_said(large, data, tmp_path):
    made = wanted(large, data, tmp_path)
    plan = plan_cluster(made, replace(NODE, nodes=8, shared=False), rows=20_000_000, console=quiet())
    notes = "\n".join(plan["notes"])
    for part in ("trainings that scores need", "holds all states at once, 305 GiB", "training holds its rows",
                 "Ray's driver holds all tokens"):  # fmt: skip
        assert part in notes
    small = plan_cluster(made, replace(NODE, kind="rtx4090"), console=quiet())
    assert not any("weights take" in note for note in small["notes"])
    wide = made.model_copy(update={"model": made.model.model_copy(update={"dtype": "float32"})})
    assert any("the weights take 30 GiB, a GPU has 24" in n for n in
               plan_cluster(wide, replace(NODE, kind="rtx4090"), console=quiet())["notes"])  # fmt: skip


def test_the_printed_form(large, data, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    plan = plan_cluster(wanted(large, data, tmp_path), replace(NODE, nodes=2), rows=270_000, console=quiet())
    print_cluster(plan, console)
    text = console.file.getvalue()
    assert "270,000 rows on 2 x 8 h100 (35% of peak: not measured): about" in text
    assert "GPU hours held" in text and "cost" in text and "side by side" in text


def test_on_the_command_line(large, data, tmp_path):
    made = wanted(large, data, tmp_path).model_dump(mode="json", exclude_none=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(made))
    run = CliRunner().invoke(
        app, ["plan", str(path), "--gpus", "h100:8", "--price", "2", "--rows", "5000", "--json", "-q"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["rows"] == 5000
    for words in (["--nodes", "8"], ["--network", "100"], ["--utilisation", "0.5"], ["--price", "0"], ["--local"]):
        idle = CliRunner().invoke(app, ["plan", str(path), *words, "-q"])
        said = f"{words[0]}: a plan for this machine doesn't look at it"
        assert idle.exit_code != 0 and said in str(idle.exception or idle.output)
