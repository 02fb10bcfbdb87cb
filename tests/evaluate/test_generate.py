"""Greedy and sampled answers: prompts as in training, whatever the batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import tiny_lora, tiny_model, tiny_tokenizer
from keepset.errors import DataError
from keepset.evaluate.generate import generate, prompt_ids, write_model_outputs
from keepset.model.encode import Encoder
from keepset.recipe import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_alpaca_eval_file(tmp_path):
    write_model_outputs(tmp_path / "m.json", "mine", ["a", "b"], ["ä", "y"])
    assert json.loads((tmp_path / "m.json").read_text())[0] == {"instruction": "a", "output": "ä", "generator": "mine"}
    with pytest.raises(ValueError):
        write_model_outputs(tmp_path / "m.json", "mine", ["a"], [])
