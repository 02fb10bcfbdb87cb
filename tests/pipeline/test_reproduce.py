"""`keepset reproduce`: the same recipe gives the same hashes, differences are named; `keepset push` to a fake hub."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from keepset.deliver.hub import public, push_to_hub
from keepset.errors import KeepsetError
from keepset.pipeline.reproduce import print_reproduction, recipe_of, reproduce
from keepset.recipe import parse_recipe
from keepset.runfolder.run import Run


@pytest.fixture(scope="module")
def run(small_run) -> Path:
    return small_run


@pytest.fixture(scope="module")
def again(run):
    return reproduce(run / "manifest.json", run.parent / "again", console=Console(file=io.StringIO()))


def test_the_same_recipe_gives_the_same_hashes(run, again):
    assert again["equal"] and not again["versions"]
    names = [row["what"] for row in again["rows"]]
    assert {"pool: fingerprint", "model: fingerprint", "chosen rows: davir", "scores/davir.parquet"} <= set(names)
    assert {"models/davir-seed0/adapter_model.safetensors", "evaluation/bm25-seed0/items.safetensors"} <= set(names)
    console = Console(file=io.StringIO(), width=120)
    print_reproduction(again, console)
    assert f"{len(names)} of {len(names)} equal" in console.file.getvalue()


def test_a_difference_is_named(run, again, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    chosen = manifest["subsets"]["bm25"]["ids"]
    manifest["files"]["scores/davir.parquet"] = "0" * 64
    manifest["subsets"]["bm25"]["ids"] = [chosen[1], chosen[0], "f" * 32]
    manifest["versions"]["torch"] = "1.0"
    other = run / "other.json"
    other.write_text(json.dumps(manifest))
    # the second folder is there and whole: nothing is computed again
    result = reproduce(other, run.parent / "again", console=Console(file=io.StringIO()))
    assert not result["equal"]
    wrong = {row["what"]: row["note"] for row in result["rows"] if not row["equal"]}
    assert wrong == {
        "chosen rows: bm25": "2 of 3 rows in common",
        "scores/davir.parquet": "rank correlation 1.000000, largest difference 0.0e+00 of the largest",
    }
    assert result["versions"]["torch"][0] == "1.0"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such manifest"), ("{", "can't be read as JSON"), ("[]", "not a manifest")]
)
def test_what_is_no_manifest_is_told_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(KeepsetError, match=message):
        reproduce(tmp_path / "manifest.json", tmp_path / "new")


def test_the_recipe_means_the_same_files_from_any_folder(tmp_path, monkeypatch):
    home, away = tmp_path / "there", tmp_path / "away"
    for folder in (home / "m", away):
        folder.mkdir(parents=True)
    (home / "m" / "config.json").write_text("{}")
    for name in ("there/pool.jsonl", "away/pool.jsonl", "there/runs"):
        (tmp_path / name).write_text("{}") if name.endswith("l") else (tmp_path / name).mkdir()
    monkeypatch.chdir(home)
    recipe = {"model": {"model_name_or_path": "m"}, "pool": "pool.jsonl", "methods": ["random"]}
    Run("runs/x").adopt(parse_recipe(recipe))
    assert recipe_of({"recipe": recipe}, Path("runs/x"), Path("new")).pool[0].path == "pool.jsonl"
    monkeypatch.chdir(away)
    found = recipe_of({"recipe": recipe}, Path("../there/runs/x"), Path("new"))
    assert found.pool[0].path == str(home / "pool.jsonl") and found.model.model_name_or_path == str(home / "m")
    # a manifest by itself: from here, else from beside it
    (home / "pool.jsonl").rename(home / "other.jsonl")
    recipe["pool"] = ["pool.jsonl", "other.jsonl"]
    found = recipe_of({"recipe": recipe}, home, Path("new"))
    assert [spec.path for spec in found.pool] == ["pool.jsonl", str(home / "other.jsonl")]


def test_the_run_itself_is_not_overwritten(run):
    with pytest.raises(KeepsetError, match="that is the run itself"):
        reproduce(run / "manifest.json", run)


# -- push -------------------------------------------------------------------------------------------------------------


class FakeHub:
    """Takes what `datasets` and the hub's client would send, in order."""

    def __init__(self, monkeypatch):
        import datasets
        import huggingface_hub

        self.sent: list[tuple] = []
        hub = self

        class Api:
            def create_repo(self, repo_id, *, repo_type, private, exist_ok):
                hub.sent.append(("repo", repo_id, repo_type, private))
                return f"https://hub/{repo_type}s/{repo_id}"

            def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type):
                hub.sent.append(("file", path_in_repo, json.loads(path_or_fileobj)))

        def push_rows(self, repo_id, config_name="default", *, private):
            hub.sent.append(("rows", config_name, self.column_names, len(self), private))

        def push_card(self, repo_id, *, repo_type):
            hub.sent.append(("card", self.content))

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub.DatasetCard, "push_to_hub", push_card)
        monkeypatch.setattr(datasets.Dataset, "push_to_hub", push_rows)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_push_sends_rows_scores_card_and_manifest_and_no_paths(run, monkeypatch):
    hub = FakeHub(monkeypatch)
    assert push_to_hub(run, "me/chosen") == "https://hub/datasets/me/chosen"
    repo, card, rows, scores, manifest = hub.sent
    assert repo == ("repo", "me/chosen", "dataset", True)
    assert "configs:" not in card[1] and "3 of 12 rows, chosen by davir" in card[1]
    assert rows == ("rows", "default", ["instruction", "output"], 3, True)
    assert scores[1] == "scores" and scores[3] == 12 and "loss_ref" in scores[2]
    assert manifest[1] == "manifest.json" and str(run.parent) not in json.dumps(manifest[2])
    assert manifest[2]["recipe"]["pool"][0]["path"] == "pool.jsonl"


def test_push_is_private_unless_asked(run, monkeypatch):
    hub = FakeHub(monkeypatch)
    push_to_hub(run, "me/chosen", private=False)
    assert hub.sent[0][3] is False


@pytest.mark.parametrize(
    ("repo", "offline", "message"),
    [("chosen", "", "user/name"), ("../x/y", "", "user/name"), ("me/chosen", "1", "HF_HUB_OFFLINE is set")],
)
def test_push_refuses_before_anything_is_sent(run, monkeypatch, repo, offline, message):
    hub = FakeHub(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(KeepsetError, match=message):
        push_to_hub(run, repo)
    assert not hub.sent


def test_push_of_an_unfinished_run(tmp_path):
    with pytest.raises(KeepsetError, match="finish the run"):
        push_to_hub(tmp_path, "me/chosen")


def test_paths_are_cut_to_names():
    assert public({"a": ["/x/y.jsonl", "b/c", 3], "d": None}) == {"a": ["y.jsonl", "b/c", 3], "d": None}
