"""The supervised mask on several templates, against a brute-force twin and as a property."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import LLAMA3, TEMPLATES, chat, encoder_for
from conftest import CHATML, tiny_tokenizer
from keepset.model.encode import Encoded, Encoder, RowRefused, encode_all
from keepset.recipe import ModelSpec


def pieces(encoder: Encoder, row: Encoded) -> list[str]:
    """Decode each supervised run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.supervised.astype(int), [0]])))
    return [encoder.tokenizer.decode(row.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


WORDS = [
    "the answer",
    " is",
    "\n",
    "\n\n",
    "Ünïcödé 漢字",
    "🦊🏽",
    "A",
    " ",
    "x" * 9,
    "assistant",
    "user\n",
    "{{ 1 }}",
    "\t",
    "</s",
]
contents = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
@given(st.lists(contents, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_mask_is_exactly_the_answers_and_their_end(
    name: str, texts: list[str], with_system: bool, last_only: bool
) -> None:
    encoder = encoder_for(name, supervise="last" if last_only else "all")
    _, _, end, strips, system = TEMPLATES[name]
    row = encoder.encode(chat(*texts, system="be kind" if with_system and system else None))
    answers = [t.strip() if strips else t for t in texts[1::2]][-1 if last_only else 0 :]
    end_id = encoder.tokenizer.convert_tokens_to_ids(end)
    runs = pieces(encoder, row)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        # A run: at most blanks merged into the first token, the answer, blanks, the end of turn.
        assert run.endswith(end)
        assert run.removesuffix(end).strip() == answer.strip()
        assert answer in run
    for i in np.flatnonzero(row.supervised):
        assert row.input_ids[i] != end_id or i + 1 == len(row.supervised) or not row.supervised[i + 1]
    whole = encoder.tokenizer.decode(row.input_ids)
    assert whole == encoder.render(chat(*texts, system="be kind" if with_system and system else None)).text


def test_chatml_token_by_token(tokenizer: object) -> None:
    encoder = encoder_for("chatml")
    row = encoder.encode(chat("hi", "yes", "more?", "no", system=""))
    t = encoder.tokenizer
    text = "".join(t.decode([i]) if s else "." for i, s in zip(row.input_ids, row.supervised, strict=True))
    assert "yes<|im_end|>" in text and "no<|im_end|>" in text
    assert text.replace(".", "") == "yes<|im_end|>no<|im_end|>"
    first = encoder.encode(chat("hi", "yes", "more?", "no"), n_prompt=2)
    assert pieces(encoder, first) == ["no<|im_end|>"]
    pair = encoder.encode_pair(chat("hi"), [{"role": "assistant", "content": "yes"}])
    assert pieces(encoder, pair) == ["yes<|im_end|>"]
    assert not row.supervised[0] and row.input_ids.dtype == np.int32


PHI3 = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("sides", [(), ("rstrip",), ("lstrip",), ("lstrip", "rstrip")])
def test_a_header_that_swallows_the_answers_blanks_is_not_supervised(sides: tuple[str, ...]) -> None:
    """Phi-3's `<|assistant|>` takes the blanks after it along, Phi-4's tokens those on both sides."""
    from tokenizers import AddedToken

    t = tiny_tokenizer(PHI3)
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    t.add_tokens([AddedToken(n, special=True, normalized=False, **dict.fromkeys(sides, True)) for n in names])
    encoder = Encoder(t, ModelSpec())
    for answer in ("one", "\n one", "one \n", "\t\none\n\n"):
        row = encoder.encode(chat(answer, answer, "more?", answer))
        first, second = pieces(encoder, row)
        assert ["".join(p.split()) for p in (first, second)] == ["one<|end|>", "one<|end|><|im_end|>"]
        assert row.supervised[list(row.ends)].all()
        ends = [token for token in t.convert_ids_to_tokens(row.input_ids[list(row.ends)]) if token.startswith("<")]
        assert ends == ["<|end|>", "<|end|>", "<|im_end|>"]


def test_bos_stands_once() -> None:
    from tokenizers.processors import TemplateProcessing

    for template in (CHATML, LLAMA3, None):
        t = tiny_tokenizer(template)
        t.bos_token = "<|endoftext|>"
        t.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        assert t("a").input_ids[0] == t.bos_token_id
        row = Encoder(t, ModelSpec()).encode(chat("hi", "yes"))
        # ChatML here writes no BOS, and a template's word is final; the plain template and Llama 3's write one.
        assert (row.input_ids == t.bos_token_id).sum() == (0 if template == CHATML else 1)


def test_text_rows_are_taken_verbatim() -> None:
    encoder = encoder_for("chatml")
    row = encoder.encode([{"role": "text", "content": "Once <|im_start|>there"}])
    assert encoder.tokenizer.decode(row.input_ids) == "Once <|im_start|>there<|im_end|>"
    assert row.supervised.tolist() == [False] + [True] * (len(row.input_ids) - 1)
    ended = encoder.encode([{"role": "text", "content": "Once<|im_end|>"}])
    assert (ended.input_ids == encoder.tokenizer.eos_token_id).sum() == 1


def test_tool_and_system_turns_are_never_supervised() -> None:
    encoder = encoder_for("chatml")
    row = encoder.encode(
        [*chat("hi", "calling"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "it is 42"}]
    )
    assert pieces(encoder, row) == ["calling<|im_end|>", "it is 42<|im_end|>"]


def test_one_by_one_equals_batch_and_a_rerun() -> None:
    encoder = encoder_for("llama3")
    rows = [chat("a" * n, "b " * n) for n in range(1, 30)]
    rows[4] = chat("x", "")
    rows[9] = chat("x <|eot_id|> y", "z")
    out, refused = encode_all(encoder, rows)
    assert [(i, r) for i, r, _ in refused] == [(4, "no-supervised-token"), (9, "special-token-in-text")]
    for i, row in enumerate(rows):
        if i in (4, 9):
            assert out[i] is None
            continue
        alone = encoder.encode(row)
        assert out[i] is not None
        assert alone.input_ids.tolist() == out[i].input_ids.tolist()
        assert alone.supervised.tolist() == out[i].supervised.tolist()


def test_a_template_without_end_of_turn_supervises_the_content_only() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    encoder = Encoder(tiny_tokenizer(bare), ModelSpec())
    assert [p.strip() for p in pieces(encoder, encoder.encode(chat("hi", "yes")))] == ["yes"]


def test_alternation_errors_become_refusals() -> None:
    for name, messages in (
        ("gemma", [*chat("a", "b"), {"role": "assistant", "content": "c"}]),
        ("mistral", chat("a", "b", system="no")),
    ):
        with pytest.raises(RowRefused) as error:
            encoder_for(name).encode(messages)
        assert error.value.reason == "template-refused"
