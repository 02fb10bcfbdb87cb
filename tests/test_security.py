"""The claims of SECURITY.md that no other test holds: pickles, paths, links, tokens, network."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from crash import SECRETS
from keepset.data import load_pool
from keepset.data.export import write_subset
from keepset.errors import KeepsetError, RecipeError
from keepset.recipe import MethodSpec, parse_recipe
from keepset.runfolder.files import write_atomic
from keepset.runfolder.layout import chosen
from keepset.runfolder.run import Run
from sweeping import sweep

ROOT = Path(__file__).resolve().parents[1]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


# -- the document ---------------------------------------------------------------------------------------------------


def test_every_test_that_security_md_names_exists():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 15
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file} has no {test}"


# -- pickles --------------------------------------------------------------------------------------------------------


def test_a_pickled_checkpoint_of_other_hands_is_dropped_not_opened(tiny_run, tmp_path):
    """The trainer's own checkpoints hold torch files: a changed one doesn't have its checksum and is removed."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    tiny_run.server.run(tiny_run.recipe, run, kill="step 3 models/warmup")
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (run / "models/warmup/trainer/checkpoint-2" / name).write_bytes(pickle.dumps(Bomb(canary)))
    assert tiny_run.resumed(run) == []
    assert not canary.exists()


def test_a_pickle_with_a_forged_checksum_is_still_not_run(tiny_run, tmp_path):
    """Whoever may write the run folder can forge the record too; torch then reads weights only."""
    import torch

    from keepset.runfolder.files import file_digest

    run, canary = tmp_path / "run", tmp_path / "canary"
    tiny_run.server.run(tiny_run.recipe, run, kill="step 3 models/warmup")
    folder = run / "models/warmup/trainer/checkpoint-2"
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"state": Bomb(canary)}, folder / name)
        meta["files"][name] = file_digest(folder / name)
    (folder / "meta.json").write_text(json.dumps(meta))
    done = tiny_run.server.run(tiny_run.recipe, run)
    assert done["exit"] != 0 and not canary.exists()


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl", "x.parquet"])
def test_an_array_of_objects_is_not_opened(tmp_path, name):
    canary = tmp_path / "canary"
    with (tmp_path / name).open("wb") as file:
        np.save(file, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(KeepsetError):
        load_pool(str(tmp_path / name))
    assert not canary.exists()


def test_a_pickle_in_place_of_a_shard_or_a_score_is_not_opened(tmp_path):
    canary, run = tmp_path / "canary", Run(tmp_path / "run")
    ids = np.array(["a", "b"], dtype=object)
    stage = {"s": {"k": 1}}
    sweep(run.path, stage, ids, lambda i, m: {"s": {"x": i.astype(float)}})
    (shard,) = (tmp_path / "run/work/s").glob("*/00000.safetensors")
    shard.write_bytes(pickle.dumps(Bomb(canary)))
    again = []
    sweep(run.path, stage, ids, lambda i, m: (again.append(1), {"s": {"x": i.astype(float)}})[1])
    (tmp_path / "run/scores").mkdir()
    (tmp_path / "run/scores/a.parquet").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(KeepsetError, match="a.parquet: damaged"):
        run.load_table("scores/a.parquet")
    assert again and not canary.exists()


def test_yaml_tags_build_nothing(tmp_path):
    from keepset.recipe import load_recipe

    (tmp_path / "r.yaml").write_text(f"pool: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/canary']\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(tmp_path / "r.yaml")
    assert not (tmp_path / "canary").exists()


# -- paths ----------------------------------------------------------------------------------------------------------

TRICKS = ["../x", "/tmp/x", "a/b", "..", ".", "", "a\0b", "a\nb", "x" * 300, "CON:", "~", "a\\b", "-rf", "$(x)", "é"]


@pytest.mark.parametrize("label", [t for t in TRICKS if t])
def test_labels_that_are_no_file_names_are_refused(label):
    base = {"pool": "a.jsonl"}
    with pytest.raises(RecipeError, match="label"):
        parse_recipe({**base, "methods": [{"name": "random", "label": label}]})
    with pytest.raises(RecipeError, match="label"):
        parse_recipe({**base, "methods": ["random"], "mix": [{"label": label, "parts": [{"source": "a"}]}]})
    with pytest.raises(ValidationError):
        MethodSpec(name="random", label=label)


@pytest.mark.parametrize("budget", ["5% \n", "  200000\ttokens ", "20%\ntokens"])
def test_budgets_make_plain_file_names(budget):
    assert re.fullmatch(r"[\w@%.-]+", chosen("davir", budget, 2))


@pytest.mark.parametrize("name", TRICKS)
def test_pool_names_and_rows_never_name_files(tiny_run, tmp_path, name):
    """A pool's name and ids are columns; with the strangest of them a run writes inside its folder and nowhere else."""
    from rich.console import Console

    from keepset.pipeline.choose import choose
    from keepset.pipeline.score import score
    from keepset.recipe import DataSpec
    from keepset.stages.job import Job

    inside, pool = tmp_path / "a" / "run", tmp_path / "pool.jsonl"
    inside.parent.mkdir()
    pool.write_text(
        "".join(json.dumps({"prompt": f"../{k}", "completion": "/etc/x " * (k + 1)}) + "\n" for k in range(6))
    )
    recipe = parse_recipe({"run_dir": str(inside), "pool": "x", "methods": ["length"], "budget": "50%"})
    recipe.pool = [DataSpec(path=str(pool), name=name)]
    job = Job(recipe, console=Console(quiet=True), text_only=True)
    with job.run.lock():
        score(job, recipe.methods[0])
        choose(job, "length", "50%")
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and inside not in p.parents]
    assert outside == [pool]
    assert {p.name for p in inside.iterdir()} <= {
        ".lock", "recipe.yaml", "quarantine.jsonl", "scores", "subsets", "subsets.json", "costs.jsonl", "work",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["subsets", "scores", "work", "recipe.yaml", "models/reference", ".lock"])
def test_links_that_lead_out_of_a_run_folder_are_refused(tmp_path, place):
    run, target = tmp_path / "run", tmp_path / "elsewhere"
    (run / place).parent.mkdir(parents=True)
    target.mkdir()
    (run / place).symlink_to(target)
    with pytest.raises(KeepsetError, match="a link that leads out of the run folder"), Run(run).lock():
        pass
    assert list(target.iterdir()) == []


def test_a_run_folder_may_itself_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with Run(tmp_path / "run").lock():
        Run(tmp_path / "run").save_json("a.json", 1)
    assert (tmp_path / "disk/a.json").exists()


def test_temporary_files_do_not_follow_links(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("a.json", "out.jsonl"):
        (tmp_path / f"{name}.part").symlink_to(precious)
    write_atomic(tmp_path / "a.json", b"1")
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    write_subset(load_pool(str(tmp_path / "pool.jsonl")), [0], tmp_path / "out.jsonl")
    assert precious.read_text() == "mine" and (tmp_path / "a.json").read_bytes() == b"1"


# -- tokens and network ---------------------------------------------------------------------------------------------


def test_tokens_of_the_environment_are_in_no_file_and_no_line(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run_dir, run)
    report = tiny_run.server.run(tiny_run.recipe, run, argv=["report", "--run_dir", str(run)])
    assert report["exit"] == 0, report["log"]
    assert list(run.rglob("*.html"))
    files = [p for p in run.rglob("*") if p.is_file()]
    assert len(files) > 50
    for secret in SECRETS.values():
        assert secret not in tiny_run.log + report["log"]
        assert not [p for p in files if secret.encode() in p.read_bytes()]


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_recipe_with_a_token_is_refused_before_it_is_stored(key):
    secret = SECRETS["HF_TOKEN"]
    with pytest.raises(RecipeError, match="HF_TOKEN") as caught:
        parse_recipe({"pool": "a.jsonl", "methods": ["random"], "train": {"extra": {key: secret}}})
    assert secret not in str(caught.value)


def test_a_local_run_asks_nobody(tiny_run, tmp_path):
    """Ingest, warm-up, gradients, reference, losses, training, evaluation, comparison, report: no connection tried."""
    assert not [p for p in tiny_run.points if p.startswith("network")]
    for command in (["report"], ["explain", "--help"], ["compare"]):
        events = tmp_path / "events"
        argv = [*command, *([] if "--help" in command else ["--run_dir", str(tiny_run.run_dir)])]
        tiny_run.server.run(tiny_run.recipe, tiny_run.run_dir, argv=argv, events=str(events))
        assert not [p for p in events.read_text().splitlines() if p.startswith("network")]


def test_the_network_guard_of_these_tests_works(tmp_path):
    from crash_server import Points

    points = Points({"run_dir": str(tmp_path)})
    for event, args in (("socket.connect", (None, ("192.0.2.1", 80))), ("socket.getaddrinfo", ("host.example", 80))):
        with pytest.raises(PermissionError):
            points.audit(event, args)
    points.audit("socket.connect", (None, "/run/a.socket"))  # a socket of this machine
    assert len(points.names) == 2
