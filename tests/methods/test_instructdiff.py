"""InstructDiff against the authors' sorting, trimming and sorting again, and on a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.methods.instructdiff import instructdiff
from keepset.methods.table import method_of
from keepset.pipeline.score import score
from keepset.recipe import MethodSpec
from keepset.stages.job import Job
from keepset.stages.losses import Losses, reference_losses
from tiny_recipe import TRAIN, quiet, recipe


def by_sorting(drop, change, band):
    """Rows in the order in which the authors take them: trim both ends by drop, then lowest base less reference."""
    rows = sorted(range(len(drop)), key=lambda i: drop[i])
    trim = int(len(rows) * band)
    return sorted(rows[trim : len(rows) - trim], key=lambda i: -change[i])


@given(st.integers(0, 1000), st.integers(3, 60), st.sampled_from([0.0, 0.1, 0.25, 0.4]))
def test_the_rows_of_the_band_come_as_the_authors_take_them_and_the_others_last(seed, n, band):
    drop, change = np.random.default_rng(seed).normal(size=(2, n))
    order = np.argsort(-instructdiff(drop, change, band=band), kind="stable").tolist()
    taken = by_sorting(drop, change, band)
    assert order[: len(taken)] == taken
    rest = sorted(set(range(n)) - set(taken), key=lambda i: -change[i])
    assert order[len(taken) :] == rest


def test_by_hand_and_rows_without_a_loss_are_not_counted():
    drop = np.array([0.5, np.nan, 0.1, 0.3, 0.2, 0.4])
    change = np.array([9.0, 0.0, 8.0, 1.0, 3.0, 2.0])
    assert instructdiff(drop, change, band=0.2).tolist() == [-91.0, pytest.approx(np.nan, nan_ok=True), -92.0, 1, 3, 2]
    assert (
        instructdiff(np.ones(4), change[:4], band=0.4).tolist() == change[:4].tolist()
    )  # equal drops: none is outside
    with pytest.raises(ValueError, match="below 0.5"):
        instructdiff(drop, change, band=0.5)


@pytest.mark.parametrize("folds", [0, 2])
def test_one_pass_a_model_gives_losses_and_entropies(folds, model_folder, data, tmp_path):
    made = recipe(model_folder, data, tmp_path, methods=["instructdiff", "davir"],
                  reference={**TRAIN, "fraction": 0.5, "folds": folds})  # fmt: skip
    job = Job(made, console=quiet())
    table = score(job, made.methods[0]).to_pydict()
    plain = score(job, made.methods[1]).to_pydict()
    for side in ("loss_ini", "loss_ref"):
        assert table[side] == plain[side]
    tokens = np.array(job.n_tokens())
    change = (np.array(table["entropy_ref"]) - np.array(table["entropy_ini"])) / tokens
    drop = (np.array(table["loss_ini"]) - np.array(table["loss_ref"])) / tokens
    np.testing.assert_allclose(table["score"], instructdiff(drop, change))
    assert np.ptp(change) > 0
    assert (np.array(table["entropy_ini"]) > 0).all()
    passes = [e["stage"] for e in job.run.costs() if e["stage"].startswith("losses")]
    assert sum("entropy" in title for title in passes) == (1 + folds if folds else 1)


def test_its_stages_are_told_apart_from_plain_losses(model_folder, data, tmp_path):
    job = Job(recipe(model_folder, data, tmp_path, methods=["instructdiff"]), console=quiet())
    stages = method_of(MethodSpec(name="instructdiff")).stages(job, None)
    assert stages == {"ini": Losses(token_loss="entropy"), "ref": reference_losses(job, "entropy")}
    assert stages["ini"].id(job) != Losses().id(job)
