"""GSM8K's number extraction, and generation."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest

from conftest import tiny_model, tiny_tokenizer
from keepset.errors import DataError
from keepset.evaluate.gsm8k import evaluate_gsm8k, final_number, official_answer, score
from keepset.model.encode import Encoder
from keepset.recipe import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("text", "official", "number"),
    [
        ("... eggs a day.\n#### 18", "18", "18"),
        ("#### 2,125", "2125", "2125"),
        ("#### -5", "-5", "-5"),
        ("#### 109,200,000", "109200000", "109200000"),
        ("#### 0.5", "0.5", "0.5"),
        ("#### 18.", "18.", "18"),  # the official rule keeps the full stop, and so calls it wrong
        ("#### 18.00", "18.00", "18"),
        ("#### $18", None, "18"),
        ("####18", None, "18"),
        ("#### 3\nBut then\n#### 4", "3", "4"),
        ("#### 5 apples", "5", "5"),
        ("The answer is 42.", None, "42"),
        ("She has 16-3-4 = 9 eggs", None, "9"),
        ("It costs $1,234.50 in total.", None, "1234.50"),
        ("so -7 degrees", None, "-7"),
        ("COVID-19 is not a number, 3 is", None, "3"),
        ("about 50%", None, "50"),
        ("half is .5", None, ".5"),
        ("there is none", None, None),
        ("", None, None),
        ("#### none", None, None),
        ("#### ", None, None),
        ("#### The answer is: 12", None, "12"),
        ("#### -$4", None, "-4"),
    ],
)
def test_extraction(text, official, number):
    assert official_answer(text) == official
    assert final_number(text) == (None if number is None else Decimal(number))


def test_score():
    assert score("so #### 1,080", "#### 1080") == (True, True)
    assert score("so #### 1,080", "It is 1080.0") == (True, False)
    assert score("so #### 18", "#### 18.") == (True, False)
    assert score("so #### 18", "no idea") == (False, False)
    with pytest.raises(DataError, match="without a number"):
        score("nothing", "3")


def setup(architecture="llama"):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    return model, Encoder(tokenizer, ModelSpec(model_name_or_path="tiny", max_length=200))


def test_evaluation_from_a_file(tmp_path):
    model, encoder = setup()
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(5)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = evaluate_gsm8k(model, encoder, str(path), limit=3, max_new_tokens=5)
    assert found["n"] == 3 == len(found["correct"]) == len(found["answers"])
    assert found["accuracy"]["value"] == np.mean(found["correct"]) and found["loss"] > 0
    json.dumps(found, allow_nan=False)
