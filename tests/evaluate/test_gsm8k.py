"""GSM8K's number extraction, and generation."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest
import torch

from conftest import tiny_lora, tiny_model, tiny_tokenizer
from keepset.errors import DataError
from keepset.evaluate.generate import generate, prompt_ids, write_model_outputs
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


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("template", [None, "plain"])
def test_prompt_is_what_training_saw(template):
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, ModelSpec(model_name_or_path="tiny", chat_template=template))
    ids, end = prompt_ids(encoder, ask("why?"))
    row = encoder.encode_pair(ask("why?"), [{"role": "assistant", "content": "the answer"}])
    assert row.input_ids[: len(ids)].tolist() == ids.tolist() and not row.supervised[: len(ids)].any()
    assert end == tokenizer.eos_token_id


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_batches_do_not_change_greedy_answers(architecture):
    model, encoder = setup(architecture)
    prompts = [ask("a"), ask("the thing that the user wants"), ask("why is that so?"), ask("zz")]
    together = generate(model, encoder, prompts, max_new_tokens=12, batch_size=4)
    alone = [generate(model, encoder, [p], max_new_tokens=12)[0] for p in prompts]
    assert together == alone and {len(a.text) > 0 for a in together} == {True}
    # Against the model step by step, without padding or cache.
    ids, end = prompt_ids(encoder, prompts[1])
    context = ids.astype(np.int64).tolist()
    for _ in range(12):
        context.append(int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax()))
        if context[-1] == end:
            break
    assert encoder.tokenizer.decode(context[len(ids) :], skip_special_tokens=True).strip() == together[1].text


def test_seeded_sampling_and_an_adapter():
    model, encoder = setup()
    sample = lambda seed: generate(model, encoder, [ask("a")] * 3, max_new_tokens=6, temperature=1.0, seed=seed)  # noqa: E731
    assert sample(0) == sample(0) != sample(1)
    greedy = generate(model, encoder, [ask("a")], max_new_tokens=8)
    adapted = generate(tiny_lora(model), encoder, [ask("a")], max_new_tokens=8)
    assert adapted != greedy


def test_a_prompt_that_does_not_fit_is_told():
    model, encoder = setup()
    with pytest.raises(DataError, match="prompt 2: over-long"):
        generate(model, encoder, [ask("a"), ask("x" * 900)])


def test_evaluation_from_a_file(tmp_path):
    model, encoder = setup()
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(5)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = evaluate_gsm8k(model, encoder, str(path), limit=3, max_new_tokens=5)
    assert found["n"] == 3 == len(found["correct"]) == len(found["answers"])
    assert found["accuracy"]["value"] == np.mean(found["correct"]) and found["loss"] > 0
    json.dumps(found, allow_nan=False)


def test_alpaca_eval_file(tmp_path):
    write_model_outputs(tmp_path / "m.json", "mine", ["a", "b"], ["ä", "y"])
    assert json.loads((tmp_path / "m.json").read_text())[0] == {"instruction": "a", "output": "ä", "generator": "mine"}
    with pytest.raises(ValueError):
        write_model_outputs(tmp_path / "m.json", "mine", ["a"], [])
