"""RDS by an embedding model: vectors against a one-row loop, and the method from a recipe."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from keepset.errors import ModelError  # noqa: E402
from keepset.features.embeddings import TextEncoder  # noqa: E402
from keepset.methods.rds import rds  # noqa: E402
from keepset.methods.table import score  # noqa: E402
from keepset.stages.job import Job  # noqa: E402
from tiny_recipe import quiet, recipe  # noqa: E402
from tolerance import FORWARD  # noqa: E402


def test_vectors_are_those_of_a_one_row_loop_whatever_the_batch(encoder_folder):
    encoder = TextEncoder(str(encoder_folder))
    texts = ["the answer", "a", "", "user " * 200, "that thing wants the answer", "the answer"]
    found = encoder(texts, token_budget=100)
    for row, text in zip(found, texts, strict=True):
        ids = encoder.tokenizer(text)["input_ids"][:62] or [encoder.blank]
        with torch.no_grad():
            states = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(row, states.mean(0).numpy(), atol=4 * FORWARD)
    np.testing.assert_allclose(encoder(texts, token_budget=10_000), found, atol=4 * FORWARD)
    assert np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-2
    assert encoder([]).shape == (0, 24)


def test_what_can_not_be_loaded_is_told_in_one_line(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        TextEncoder(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="embedding_model") as caught:
        TextEncoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_recipe_compares_by_the_embedding_model_and_by_query(encoder_folder, model_folder, data, tmp_path):
    other = {"name": "rds", "label": "embedded", "options": {"embedding_model": str(encoder_folder)}}
    single = {"name": "rds", "label": "single", "options": {**other["options"], "per": "query"}}
    made = recipe(
        model_folder, data, tmp_path, methods=["rds", other, single], select={"policy": "round_robin"}, evaluate={}
    )
    job = Job(made, console=quiet())
    tables = {m.label: score(job, m) for m in job.recipe.methods}
    assert len({tuple(np.argsort(t["score"].to_numpy())) for t in tables.values()}) >= 2
    encoder = TextEncoder(str(encoder_folder))
    _, codes = job.task_codes()
    want, _ = rds(encoder(job.texts()), encoder(job.target_texts(with_chosen=True)), codes)
    np.testing.assert_allclose(tables["embedded"]["score"].to_numpy(), want, atol=4 * FORWARD)
    assert sum(c.startswith("task.") for c in tables["embedded"].column_names) == 2
    assert sum(c.startswith("task.") for c in tables["single"].column_names) == 6  # one a query: round-robin over them
    stages = [e["stage"] for e in job.run.costs() if e["stage"].startswith("embeddings")]
    assert len(stages) == 1  # the second label reads what the first one stored
