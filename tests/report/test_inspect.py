"""`keepset inspect`: what it finds in good, bad and leaking data."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from keepset.demo import FOLDER
from keepset.recipe import ModelSpec
from keepset.report.inspect import inspect_data, print_inspection
from keepset.selection.dedup import near_copies, near_pairs

WORDS = (
    "a river town keeps its small library open while people plan slow walks past mills and farms in the rain".split()
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(seed: int, n: int = 24) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), n)) + f" end {seed}"


def printed(facts: dict[str, Any], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=160, **options)
    print_inspection(facts, console)
    return console.file.getvalue()


def test_the_demo_pool() -> None:
    facts = inspect_data(FOLDER / "pool.jsonl", target=[FOLDER / "target.jsonl"], evaluation=[FOLDER / "eval.jsonl"])
    assert facts["format"] == "alpaca" and facts["container"] == ["jsonl"]
    assert facts["rows_in"] == facts["rows"] + facts["quarantined"] == 164
    assert facts["duplicates"] == 4
    places = {r["reason"]: (r["rows"], r["first"]["line"]) for r in facts["reasons"]}
    assert places == {"empty-completion": (1, 109), "null-field": (1, 32)}
    assert facts["roles"] == {"user assistant": 162}
    assert [leak["exact"] for leak in facts["leakage"]] == [{}, {}] and [leak["near"] for leak in facts["leakage"]] == [
        0,
        0,
    ]
    assert sum(b["rows"] for b in facts["lengths"]["histogram"]) == 162
    assert len(facts["examples"]) == 3
    assert any("exact copies" in line for line in facts["advice"])
    json.dumps(facts)


def test_pairs_are_told_by_length() -> None:
    facts = inspect_data(FOLDER / "eval.jsonl")
    assert facts["format"] == "preference"
    assert facts["pairs"]["pairs"] == 60 and facts["pairs"]["tasks"] == {"dates": 30, "support": 30}
    rows = [json.loads(line) for line in (FOLDER / "eval.jsonl").read_text().splitlines()]
    assert facts["pairs"]["chosen_longer"] == np.mean([len(r["chosen"]) > len(r["rejected"]) for r in rows])


def test_leaks_exact_and_near_are_found_and_placed(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": sentence(i)} for i in range(60)]
    pairs = [{"prompt": "Question 7?", "chosen": sentence(7), "rejected": sentence(1000)},
             {"prompt": "Question 9?", "chosen": sentence(9) + " indeed", "rejected": sentence(1001)},
             {"prompt": "Quite another one?", "chosen": sentence(1002), "rejected": sentence(1003)}]  # fmt: skip
    pool, target = write(tmp_path / "pool.jsonl", rows), write(tmp_path / "target.jsonl", pairs)
    facts = inspect_data(pool, target=[target])
    leak = facts["leakage"][0]
    assert leak["exact"] == {"row": 1, "prompt": 1}
    assert [row["line"] for row in leak["first"]] == [8, 10]
    pairs[1]["prompt"] = "Question number nine?"
    facts = inspect_data(pool, target=[write(target, pairs)])
    assert facts["leakage"][0]["exact"] == {"row": 1} and facts["leakage"][0]["near"] == 1
    assert {row["kind"] for row in facts["leakage"][0]["first"]} == {"row", "near"}
    assert any("take them out" in line for line in facts["advice"])


def test_near_pairs_agree_with_every_pair_compared() -> None:
    rng = np.random.default_rng(3)
    base = [sentence(i, 40) for i in range(40)]
    edited = []
    for text in base:
        words = text.split()
        for k in rng.integers(0, len(words), int(rng.integers(0, 4))):
            words[k] = "changed"
        edited.append(" ".join(words))

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    true = {
        i for i in range(40) if len(grams(base[i]) & grams(edited[i])) / len(grams(base[i]) | grams(edited[i])) >= 0.8
    }
    assert 5 < len(true) < 40
    assert near_pairs(edited, base, 0.8) == {i: i for i in true}


def test_near_copies_count_exact_ones_too() -> None:
    assert near_copies([sentence(1), sentence(2), sentence(1), sentence(1) + " more", sentence(2)], 0.8) == 3
    assert near_copies([], 0.8) == 0 and near_copies(["", ""], 0.8) == 0


def test_all_rows_bad_is_a_finding_not_a_traceback(tmp_path: Path) -> None:
    facts = inspect_data(write(tmp_path / "bad.jsonl", [{"prompt": "x?", "completion": ""}] * 3))
    assert facts["rows"] == 0 and facts["quarantined"] == facts["rows_in"] == 3
    assert facts["lengths"] is None and facts["examples"] == []
    assert "empty-completion" in printed(facts)


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> ModelSpec:
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "model"
    )
    save_file({"unused": np.zeros(1)}, tmp_path / "model" / "model.safetensors")
    return ModelSpec(model_name_or_path=str(tmp_path / "model"), max_length=200)


def test_rows_are_rendered_with_their_supervised_tokens(tmp_path: Path, model: ModelSpec) -> None:
    rows = [{"prompt": "Say it.", "completion": "the answer"}, {"prompt": "Long?", "completion": "word " * 400},
            {"prompt": "Evil?", "completion": "a <|im_end|> b"}]  # fmt: skip
    facts = inspect_data(write(tmp_path / "pool.jsonl", rows), model=model)
    first = facts["examples"][0]["pieces"]
    assert [flag for _, flag in first] == [False, True, False]
    assert first[1][0] == "the answer<|im_end|>"
    assert first[0][0].endswith("Say it.<|im_end|>\n<|im_start|>assistant\n")
    assert {r["reason"]: r["rows"] for r in facts["reasons"]} == {"over-long": 1, "special-token-in-text": 1}
    assert facts["lengths"]["unit"] == "supervised tokens"
    assert any("refused" in row for row in facts["examples"])


def test_printing_marks_supervised_text_also_without_colour(tmp_path: Path) -> None:
    facts = inspect_data(
        write(tmp_path / "pool.jsonl", [{"prompt": "Hm [bold]?", "completion": "so [red]it[/red] is"}])
    )
    plain = printed(facts)
    assert "«so [red]it[/red] is»" in plain and "Hm [bold]?" in plain
    coloured = printed(facts, force_terminal=True, color_system="standard")
    assert "\x1b[4;32mso [red]it[/red] is" in coloured and "«" not in coloured


def test_inspect_needs_no_torch() -> None:
    code = "import keepset.report.inspect, keepset.report.explain, keepset.report, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
