"""Files of a run folder: whole, and JSON that is JSON."""

from __future__ import annotations

import os

import pytest

from keepset.errors import KeepsetError
from keepset.runfolder.run import Run


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeepsetError, match="No space left on device"):
        Run(tmp_path).save_json("a.json", {})


def test_json_that_is_written_is_json(tmp_path):
    Run(tmp_path).save_json("a.json", {"x": [1.5, float("nan"), (float("-inf"), "NaN")], "é": {"y": float("inf")}})
    assert '"é"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert Run(tmp_path).load_json("a.json") == {"x": [1.5, None, [None, "NaN"]], "é": {"y": None}}


def test_what_another_process_may_read_is_never_open_for_writing_under_its_name(tiny_run):
    """Of a whole run; a trainer's own working folders are read by the training that resumes, and by nobody else."""
    opened = {point.split(" ", 1)[1].partition(" #")[0] for point in tiny_run.points
              if point.startswith(("open ", "save "))}  # fmt: skip
    private = [place for place in opened if "/trainer/" in place or "/trainer.result/" in place]
    assert len(private) > 10 and "costs.jsonl.part" in opened
    assert [place for place in opened if place not in private and not place.endswith(".part")] == []
