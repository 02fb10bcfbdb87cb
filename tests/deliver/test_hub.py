"""`keepset push` to a fake hub: what is sent, and what is refused before anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepset.deliver.hub import public, push_to_hub
from keepset.errors import KeepsetError


@pytest.fixture(scope="module")
def run(small_run) -> Path:
    return small_run


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
