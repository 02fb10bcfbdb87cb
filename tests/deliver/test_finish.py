"""`run_recipe`: where users import it from, and what a finished folder has."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import keepset.pipeline
from keepset.deliver.finish import run_recipe
from keepset.runfolder import layout


def test_users_import_it_from_the_pipeline():
    assert keepset.pipeline.run_recipe is run_recipe
    with pytest.raises(AttributeError, match=r"module 'keepset.pipeline' has no attribute 'run_recipy'"):
        _ = keepset.pipeline.run_recipy


def test_a_finished_folder_is_whole(small_run: Path):
    for name in (
        layout.RECIPE, layout.COSTS, layout.QUARANTINE, layout.SUBSETS, layout.COMPARISON, layout.FINDINGS,
        layout.MANIFEST, layout.CARD, layout.REPORT, layout.ROWS, layout.LOCK, layout.scores("davir"),
        layout.subset("rose"), layout.done(layout.reference()), layout.done(layout.WARMUP),
        layout.done(layout.model("bm25", 0)), layout.done(layout.evaluation("base", None)),
        f"{layout.evaluation('random-0', 0)}/{layout.ITEMS}", f"{layout.TRAINERS_FOLDER}/trl_sft.yaml",
        layout.record(layout.COMPARISON), layout.SEEN_FROM,
    ):  # fmt: skip
        assert (small_run / name).is_file(), name
    assert layout.name_and_seed("a-seed1-seed7") == ("a-seed1", 7) and layout.name_and_seed("base") is None
