"""Answers with thinking: what is a control token, what a template leaves of an answer, and what is said of it."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from rich.console import Console

from conftest import CHATML, tiny_tokenizer
from keepset.errors import ModelError
from keepset.evaluate.generate import prompt_ids
from keepset.model.encode import Encoder, RowRefused, encode_all, what_is_lost
from keepset.recipe import ModelSpec
from keepset.report.inspect import inspect_data, print_inspection

END = "<|im_end|>\n"
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] != 'assistant' %}"
CUTS = HEAD + (  # DeepSeek: all answers lose their thinking
    "{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
REWRITES = HEAD + (  # Qwen3: a block before the last answer, empty if it brings none; none before the earlier ones
    "{{ m['content'] }}{% else %}{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}{{ '<think>\n' }}"
    "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip('\n') }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSES = HEAD + (  # DeepSeek-V3.1: every answer begins with the end of its thinking
    "{{ m['content'] }}{% else %}{{ '</think>' + m['content'].split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
TELLS = (  # SmolLM3: the system prompt speaks of the tags
    "{{ '<|im_start|>system\nThink first: <think> thoughts </think> answer<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
ROLES = (  # roles that look like tags
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</' + m['role'] + '>' }}{% endfor %}"
)


def encoder_for(template: str, *tokens: str, **spec: object) -> Encoder:
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(list(tokens))
    return Encoder(tokenizer, ModelSpec(**{"max_length": 4096, **spec}))


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


def supervised(encoder: Encoder, *contents: str) -> str:
    row = encoder.encode(talk(*contents))
    return encoder.tokenizer.decode(row.input_ids[row.supervised])


THOUGHT = "<think>\nTwice 3.\n</think>\n\nIt is 6."
PLAIN = "It is 6.<|im_end|>"


@pytest.mark.parametrize("tokens", [(), ("<think>", "</think>")])  # plain text in some vocabularies
@pytest.mark.parametrize(
    ("template", "last", "earlier", "unthought", "lost"),
    [
        (CHATML, THOUGHT + "<|im_end|>", THOUGHT + "<|im_end|>", PLAIN, ("", "")),
        (CUTS, PLAIN, PLAIN, PLAIN, ("last", "last")),
        (REWRITES, THOUGHT + "<|im_end|>", PLAIN, "<think>\n\n</think>\n\n" + PLAIN, ("", "earlier")),
        (CLOSES, "</think>\n\n" + PLAIN, "</think>\n\n" + PLAIN, "</think>" + PLAIN, ("last", "last")),
        (TELLS, THOUGHT + "<|im_end|>", THOUGHT + "<|im_end|>", PLAIN, ("", "")),
    ],
)
def test_what_a_template_leaves_is_supervised(template, last, earlier, unthought, lost, tokens):  # type: ignore[no-untyped-def]
    if template == CLOSES and not tokens:
        pytest.skip("one tag alone is known as such by being a token")
    encoder = encoder_for(template, *tokens)
    assert supervised(encoder, "3+3?", THOUGHT) == last
    assert supervised(encoder, "3+3?", "It is 6.") == unthought
    assert supervised(encoder, "3+3?", THOUGHT, "And?", THOUGHT) == earlier + last
    rows = [encoder.encode(talk("3+3?", THOUGHT)), encoder.encode(talk("3+3?", THOUGHT, "And?", THOUGHT))]
    assert (rows[0].lost, rows[1].lost) == lost


def test_how_many_rows_lose_what_is_counted() -> None:
    encoder = encoder_for(REWRITES)
    rows, refused = encode_all(encoder, [talk("a", THOUGHT), *[talk("a", THOUGHT, "b", "c")] * 2, talk("a", "b")])
    assert not refused
    told = "2 rows: the chat template drops text (thinking) of earlier answers; what it leaves is supervised"
    assert what_is_lost(rows) == [told]  # type: ignore[arg-type]
    rows, _ = encode_all(encoder_for(CUTS), [talk("a", THOUGHT, "b", "c"), talk("a", THOUGHT)])
    assert [line.split(":")[0] for line in what_is_lost(rows)] == ["1 rows", "1 rows"]  # type: ignore[arg-type]


FOLDS = (  # Mistral-7B-Instruct-v0.3: the system text stands in the last message, where that is the user's
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'user' %}{{ messages[0]['content'] }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)


def test_messages_that_are_not_written_and_turns_without_an_end_are_counted() -> None:
    system = [{"role": "system", "content": "Be brief."}]
    rows, refused = encode_all(
        encoder_for(FOLDS), [[*system, *talk("a", "b")], talk("a", "b"), [*system, *talk("c", "d")]]
    )
    assert not refused and [row.left_out for row in rows if row] == ["system", "", "system"]
    told = "2 rows: the chat template does not write a system message; they are scored without it"
    assert what_is_lost(row for row in rows if row) == [told]
    endless = encoder_for("{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}")
    assert supervised(endless, "a", "b") == "b"
    (told,) = what_is_lost([endless.encode(talk("a", "b")), endless.encode([{"role": "text", "content": "a b"}])])
    assert told.startswith("1 rows: the chat template writes no end of turn after the answer")


def test_several_templates_and_no_default() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = {"tool_use": REWRITES, "default": CHATML}
    assert Encoder(tokenizer, ModelSpec()).template == CHATML
    tokenizer.chat_template = {"tool_use": REWRITES, "rag": CHATML}
    with pytest.raises(ModelError, match="chat templates rag, tool_use and none called default"):
        Encoder(tokenizer, ModelSpec())
    assert Encoder(tokenizer, ModelSpec(chat_template="plain")).template != CHATML


def test_an_answer_of_thinking_alone_is_refused_where_it_is_dropped() -> None:
    with pytest.raises(RowRefused, match="no-supervised-token: the chat template drops the whole answer"):
        encoder_for(CUTS).encode(talk("a", "<think>b</think>"))


@pytest.mark.parametrize(
    "change",
    [
        "m['content'] | reverse",
        "m['content'].split('</think>')[-1] | upper",
        "('So:' if 'think' in m['content'] else '') + m['content'].split('</think>')[-1]",
        "m['content'].split('</think>')[-1] + m['content']",
    ],
)
def test_what_is_not_the_answer_with_a_piece_cut_out_is_refused(change: str) -> None:
    template = CUTS.replace("m['content'].split('</think>')[-1].lstrip('\n')", change)
    assert template != CUTS
    with pytest.raises(RowRefused, match="template-refused"):
        encoder_for(template).encode(talk("3+3?", THOUGHT))


def test_tokens_that_make_turns_stay_control_tokens() -> None:
    for template in (REWRITES, CUTS, CLOSES, TELLS):
        encoder = encoder_for(template, "<think>", "</think>")
        for content in ("a<|im_end|>", "<|im_start|>a"):
            for row in (talk(content, "b"), talk("a", content)):
                with pytest.raises(RowRefused, match="special-token-in-text"):
                    encoder.encode(row)
        encoder.encode(talk("what does <think> do?", "b"))
    tags = [f"<{close}{role}>" for role in ("system", "user", "assistant") for close in ("", "/")]
    encoder = encoder_for(ROLES, *tags)
    assert supervised(encoder, "a", "b") == "b</assistant>"
    for tag in tags:
        with pytest.raises(RowRefused, match="special-token-in-text"):
            encoder.encode(talk("a", tag))


def test_no_clock_of_the_template_tells_today() -> None:
    template = "{{ strftime_now('%Y-%m-%d, %H:%M, %A') }}\n" + CHATML
    encoder = encoder_for(template)
    text = encoder.render(talk("a", "b")).text
    assert text.startswith("2024-07-26, 00:00, Friday\n")
    # and only while keepset renders
    out = encoder.tokenizer.apply_chat_template(talk("a", "b"), chat_template=template, tokenize=False)
    assert out[:4] == str(datetime.date.today().year)


def test_keys_stay_where_masks_did() -> None:
    def before(encoder: Encoder) -> str:
        spec = encoder.spec
        options = [encoder.template, "26 Jul 2024", spec.supervise, spec.max_length, spec.overlong, False, 1]
        backend = encoder.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(json.dumps(options).encode() + backend.encode()).hexdigest()

    for kept in (encoder_for(CHATML), encoder_for(CHATML, chat_template="plain")):
        assert kept.fingerprint == before(kept)
    for changed in (REWRITES, CUTS, CHATML + "{{ strftime_now('%Y') }}", CHATML.replace("'<|im_end|>' +", "")):
        assert encoder_for(changed).fingerprint != before(encoder_for(changed))


def test_inspect_says_what_the_template_drops(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    encoder_for(CUTS).tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=320, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "model/model.safetensors").touch()  # only the tokenizer is read
    pool = tmp_path / "pool.jsonl"
    rows = [talk("a", THOUGHT), talk("b", "It is 6.")]
    pool.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    facts = inspect_data(pool, model=ModelSpec(model_name_or_path=str(tmp_path / "model")))
    told = "1 rows: the chat template drops text (thinking) of the last answer; what it leaves is supervised"
    assert facts["drops"] == [told] and not facts["reasons"]
    console = Console(file=io.StringIO(), width=200)
    print_inspection(facts, console)
    assert told in console.file.getvalue()  # type: ignore[attr-defined]


def test_prompts_for_generation_end_where_the_answer_begins() -> None:
    encoder = encoder_for(REWRITES)
    ids, end = prompt_ids(encoder, talk("hi"))
    assert encoder.tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert end == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    twice = CHATML.replace("'<|im_end|>' +", "'<|im_end|><|endoftext|>' +")  # the first of them stops it
    assert prompt_ids(encoder_for(twice), talk("hi"))[1] == end
