"""Per-token loss changes of one row: the same numbers as the model gives token by token."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from conftest import tiny_lora, tiny_model
from keepset.errors import KeepsetError
from keepset.model.load import load
from keepset.recipe import ModelSpec
from keepset.report.explain_tokens import print_token_changes, token_changes
from report_fixture import make_run
from tolerance import MAPPED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    run = make_run(folder, 30, methods=("davir",))
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tiny_lora(tiny_model("llama")).save_pretrained(run / "models" / "reference")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["model_name_or_path"] = str(folder / "model")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def first_id(run: Path) -> str:
    return str(pq.read_table(run / "scores" / "davir.parquet")["id"][0])


def test_the_losses_are_the_model_s_own(run: Path) -> None:
    import torch
    from peft import PeftModel

    facts = token_changes(run, first_id(run))
    loaded = load(ModelSpec(model_name_or_path=str(run.parent / "model")))
    from keepset.data import load_pool

    row = loaded.encoder.encode(load_pool(run.parent / "pool.jsonl").messages(0))
    ids = torch.tensor(row.input_ids[None].astype("int64"))
    adapted = PeftModel.from_pretrained(loaded.model, str(run / "models" / "reference"))
    with torch.no_grad():
        after = -adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        with adapted.disable_adapter():
            before = -adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    mask = torch.tensor(row.supervised[1:])
    assert [t["before"] for t in facts["tokens"]] == pytest.approx(before[mask].tolist(), rel=MAPPED)
    assert [t["after"] for t in facts["tokens"]] == pytest.approx(after[mask].tolist(), rel=MAPPED)
    assert facts["before"] != pytest.approx(facts["after"], rel=1e-3)
    assert "".join(t["text"] for t in facts["tokens"]).endswith("<|im_end|>")


def test_printing_names_the_largest_changes(run: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    facts = token_changes(run, first_id(run)[:16])
    print_token_changes(facts, console)
    most = max(facts["tokens"], key=lambda t: t["before"] - t["after"])
    assert f"fell most: {most['text']!r} {most['before']:.2f}→{most['after']:.2f}" in console.file.getvalue()


def test_without_a_reference_it_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, 10, methods=("davir",))
    with pytest.raises(KeepsetError, match="no reference model here"):
        token_changes(run, first_id(run))
    (tmp_path / "pool.jsonl").unlink()
    with pytest.raises(KeepsetError, match="the text of row"):
        token_changes(run, first_id(run))


def test_kept_losses_of_a_reference_from_elsewhere_are_read(run: Path, tmp_path: Path, monkeypatch) -> None:
    """The models run once, while scoring; of two kept losses the cross-entropy is told."""
    from transformers import AutoModelForCausalLM

    from keepset.methods.table import score
    from keepset.recipe import parse_recipe
    from keepset.stages.job import Job

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    focal = {"name": "davir", "label": "focal", "options": {"token_loss": "focal"}}
    recipe |= {
        "run_dir": str(tmp_path), "methods": ["davir", focal], "reference": {"path": str(run / "models/reference")},
        "batching": {"keep_token_losses": True},
    }  # fmt: skip
    made = parse_recipe(recipe)
    tables = [score(Job(made, console=Console(quiet=True)), spec).to_pylist() for spec in made.methods]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("ran the models again"))
    for k in (0, 3):
        told = token_changes(tmp_path, tables[0][k]["id"])
        assert told["before"] == pytest.approx(tables[0][k]["loss_ini"], rel=1e-5)
        assert told["after"] == pytest.approx(tables[0][k]["loss_ref"], rel=1e-5)
        assert tables[1][k]["loss_ini"] != pytest.approx(tables[0][k]["loss_ini"], rel=1e-3)
