"""DavIR and RHO without the tokens that end a turn: which tokens go, and the losses against one row at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from chat_templates import TEMPLATES, chat, encoder_for
from keepset.errors import DataError, RecipeError
from keepset.methods.table import score
from keepset.model.encode import Encoded, content_only
from keepset.recipe import MethodSpec
from keepset.stages.job import Job
from tiny_recipe import quiet, recipe
from tolerance import FORWARD


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_ends_of_turns_go(name):
    encoder, end = encoder_for(name, supervise="all"), TEMPLATES[name][2]
    row = encoder.encode(chat("the user", "the answer", "the thing", "is that"))
    less = content_only(row)
    gone = row.supervised & ~less.supervised
    names = encoder.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert [names[t] for t in np.flatnonzero(gone)] == [end, end]
    assert end not in [names[t] for t in np.flatnonzero(less.supervised)]
    assert (less.input_ids == row.input_ids).all()


def test_a_row_of_nothing_else_is_not_passed_over():
    end = Encoded(np.array([5, 2], dtype=np.int32), np.array([False, True]), ends=(1,))
    with pytest.raises(DataError, match="only supervised token ends its turn"):
        content_only(end)
    unended = replace(end, ends=())  # a template that ends no turn
    assert content_only(unended).supervised.tolist() == [False, True]


def test_losses_are_those_of_one_row_at_a_time(model_folder, data, tmp_path):
    options = {"end_of_turn": False}
    specs = [MethodSpec(name=n, label=n, options=options) for n in ("davir", "davir-ref", "rho-sum", "rho-mean")]
    whole = MethodSpec(name="davir", label="whole", options={})
    job = Job(recipe(model_folder, data, tmp_path, methods=[*specs, whole]), console=quiet())
    tables = {spec.label: score(job, spec).to_pydict() for spec in (*specs, whole)}
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, str(tmp_path / "models/reference")).eval()
    place = {row_id: i for i, row_id in enumerate(tables["davir"]["id"])}
    for row_id, row in zip(job.ids, job.rows, strict=True):
        kept = content_only(row).supervised
        ref = summed(model, row.input_ids, kept)
        with model.disable_adapter():
            ini = summed(model, row.input_ids, kept)
        i = place[str(row_id)]
        assert tables["davir"]["loss_ini"][i] == pytest.approx(ini, rel=4 * FORWARD)
        assert tables["davir"]["loss_ref"][i] == pytest.approx(ref, rel=4 * FORWARD)
        assert tables["davir"]["score"][i] == pytest.approx((ini - ref) / ini, rel=1e-2, abs=1e-5)
        assert tables["rho-mean"]["score"][i] == pytest.approx(tables["rho-sum"]["score"][i] / kept.sum())
        assert tables["whole"]["loss_ini"][i] > tables["davir"]["loss_ini"][i]


def summed(model, ids, kept):
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return float(losses[torch.from_numpy(kept[1:])].double().sum())


@pytest.mark.parametrize(
    ("reference", "options", "word"),
    [({"folds": 2}, {}, "reference.folds"), ({}, {"side": "margin"}, "side: chosen")],
)
def test_what_it_does_not_go_with_is_said(reference, options, word, model_folder, data, tmp_path):
    spec = MethodSpec(name="davir", label="davir", options={"end_of_turn": False, **options})
    made = recipe(model_folder, data, tmp_path, methods=[spec], reference={"num_train_epochs": 1, **reference})
    with pytest.raises(RecipeError, match=word):
        score(Job(made, console=quiet()), spec)
