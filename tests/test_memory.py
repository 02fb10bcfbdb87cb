"""Out of memory while scoring: the batch is halved and counted, no row is skipped, the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest

from keepset.memory import Count, in_halves
from keepset.runfolder.run import Run
from tolerance import BACKWARD


def test_halves_cover_every_row_once_in_order():
    seen, tried = [], []

    def compute(indices):
        tried.append(len(indices))
        if len(indices) > 3:
            raise MemoryError
        seen.extend(indices.tolist())

    before = Count.total
    in_halves(np.arange(13), compute)
    assert seen == list(range(13))
    assert Count.total - before == sum(n > 3 for n in tried)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_one_row_that_does_not_fit_is_told(error):
    def compute(indices):
        raise error

    with pytest.raises(type(error)):
        in_halves(np.arange(4), compute)


def test_other_errors_are_not_retried():
    calls = []

    def compute(indices):
        calls.append(1)
        raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(np.arange(4), compute)
    assert len(calls) == 1


def test_halvings_are_recorded_with_the_stage(tmp_path):
    def compute(indices):
        if len(indices) > 1:
            raise MemoryError

    run = Run(tmp_path)
    with run.timed("losses"):
        in_halves(np.arange(2), compute)
    with run.timed("other"):
        pass
    assert [c.get("halved_batches") for c in run.costs()] == [1, None]


@pytest.fixture
def tight(monkeypatch):
    """Batches of more than 2 rows don't fit."""
    torch = pytest.importorskip("torch")
    from keepset.features import gradients
    from keepset.model import layout
    from keepset.model import pack as packing
    from keepset.model.llama_forward import LlamaForward

    def small(real, count):
        def call(*args, **kwargs):
            if count(*args, **kwargs) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(
        packing, "last_hidden", small(packing.last_hidden, lambda model, batch, **more: len(batch.rows))
    )
    monkeypatch.setattr(LlamaForward, "__call__", small(LlamaForward.__call__, lambda forward, batch: len(batch.rows)))
    monkeypatch.setattr(gradients, "lay_out", small(layout.lay_out, len))


WHATS = ["losses", "losses of both", "representations", "influence", "target", "target of tasks", "pairs"]


@pytest.mark.parametrize("what", WHATS)
def test_scores_stay_when_memory_is_short(what, tight, monkeypatch, caplog):
    from conftest import random_rows, tiny_lora, tiny_model
    from keepset.evaluate.preference import pair_logps
    from keepset.features.influence import influence
    from keepset.features.losses import row_losses
    from keepset.features.representations import representations
    from keepset.features.targets import target_vectors
    from keepset.model import pack as packing
    from keepset.model.passes import Shortcuts

    model, rows = tiny_lora(tiny_model("llama")), random_rows(9)
    packing.bare(model).keepset_engine = packing.Engine(packed=True)  # checked before memory was short
    pairs = [(r, None) for r in random_rows(2, seed=5)]

    def numbers():
        if what == "losses":
            return row_losses(model, rows, token_budget=400, shortcuts=Shortcuts(prefix=False)).nll
        if what == "losses of both":
            return row_losses(model, rows, token_budget=400, adapters=(False, True), per_token=True).nll
        if what == "representations":
            return representations(model, rows, token_budget=400)
        if what == "pairs":
            found = pair_logps(model, list(zip(rows, random_rows(9, seed=3), strict=True)), token_budget=400)
            return np.concatenate([found.chosen, found.rejected])
        if what.startswith("target"):
            sides = list(zip(rows, random_rows(9, seed=3), strict=True))
            options = {"loss": "dpo", "normalise": "task"} if what == "target of tasks" else {"loss": "sft"}
            found = target_vectors(model, sides, np.arange(9) % 2, token_budget=400, **options)
            return np.concatenate([b.flatten().numpy() for b in found.blocks.values()])
        target = target_vectors(model, pairs, np.zeros(2, dtype=int), n_tasks=1, loss="sft")
        return influence(model, rows, target, map="sgd", token_budget=400).dots

    before = Count.total
    got = numbers()
    assert Count.total > before and "is halved" in caplog.text
    monkeypatch.undo()
    want = numbers()
    assert np.abs(got - want).max() <= BACKWARD * np.abs(want).max()
