"""Chat templates: which one, its fingerprint, and those that take too much."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from conftest import CHATML, tiny_tokenizer
from keepset.errors import ModelError
from keepset.model.encode import Encoder, RowRefused, encode_all
from keepset.recipe import ModelSpec


def row(question: str = "hi", answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def reason(encoder: Encoder, messages: list[dict[str, str]], n_prompt: int = 0) -> str:
    with pytest.raises(RowRefused) as error:
        encoder.encode(messages, n_prompt=n_prompt)
    assert "\n" not in error.value.detail
    return error.value.reason


def test_dates_do_not_change_from_day_to_day() -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n" + CHATML
    encoder = Encoder(tiny_tokenizer(template), ModelSpec())
    assert encoder.render(row()).text.startswith("26 Jul 2024")


def test_template_choice(tmp_path: Path) -> None:
    t = tiny_tokenizer()
    assert Encoder(t, ModelSpec(chat_template="plain")).render(row()).text == "User: hi\n\nAssistant: yes<|im_end|>"
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert Encoder(t, ModelSpec(chat_template=str(file))).render(row()).text == "<hi><yes>"
    with pytest.raises(ModelError, match="can't be read"):
        Encoder(t, ModelSpec(chat_template=str(tmp_path / "none.jinja")))
    named = tiny_tokenizer({"default": CHATML, "tool_use": "x"})  # type: ignore[arg-type]
    assert Encoder(named, ModelSpec()).template == CHATML
    bare = tiny_tokenizer(None)
    bare.eos_token = None
    with pytest.raises(ModelError, match="EOS"):
        Encoder(bare, ModelSpec())


def test_plain_template_with_system_tool_and_turns() -> None:
    encoder = Encoder(tiny_tokenizer(None), ModelSpec())
    messages = [
        {"role": "system", "content": "Be brief."},
        *row(),
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
    assert encoder.render(messages).text == (
        "Be brief.\n\nUser: hi\n\nAssistant: yes<|im_end|>\n\nTool: 7\n\nAssistant: seven<|im_end|>"
    )


def test_fingerprint_covers_what_changes_tokens(tmp_path: Path) -> None:
    prints = [
        Encoder(tiny_tokenizer(), spec).fingerprint
        for spec in (
            ModelSpec(),
            ModelSpec(device="cpu"),
            ModelSpec(chat_template="plain"),
            ModelSpec(supervise="last"),
            ModelSpec(max_length=77),
            ModelSpec(overlong="truncate"),
        )
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 5
    other = tiny_tokenizer()
    other.add_tokens(["newword"])
    assert Encoder(other, ModelSpec()).fingerprint != prints[0]


TURNS = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


DOUBLING = "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"


GREEDY = [
    LOOP,
    "{{ 9 ** (9 ** 9) }}",
    "{% macro f(n) %}{% for a in range(9) %}{{ f(n + 1) if n < 12 }}{% endfor %}{% endmacro %}{% set x = f(0) %}",
    DOUBLING,
    "{% set x = 'x' * 99999999999 %}",
    "{% set x = 'x' | center(99999999999) %}",
    "{% set x = '%099999999999d' | format(1) %}",
]


@pytest.fixture
def tight(monkeypatch):
    from keepset.data.bounded import Bounds
    from keepset.model import template

    bounds = Bounds(seconds=0.3, memory=1 << 26)
    monkeypatch.setattr(template, "LIMITS", bounds)
    return bounds


@pytest.mark.parametrize("greedy", GREEDY)
def test_a_template_that_takes_too_much_is_refused_at_once(greedy: str, tight) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match="takes too much time or memory"):
        Encoder(tiny_tokenizer(greedy + TURNS), ModelSpec())
    assert time.monotonic() - start < 10 and not tight.watching


@pytest.mark.parametrize("greedy", [LOOP, DOUBLING])
def test_a_template_that_waits_for_a_word_costs_that_row(greedy: str, tight) -> None:
    template = "{% if 'open sesame' in messages[0]['content'] %}" + greedy + "{% endif %}" + TURNS
    alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0  # pytest-timeout's
    encoder = Encoder(tiny_tokenizer(template), ModelSpec())
    pool = [row("hi"), row("open sesame"), *[row(f"q{k}") for k in range(1000)]]
    encoded, refused = encode_all(encoder, pool)
    assert [(i, reason) for i, reason, _ in refused] == [(1, "template-refused")]
    assert "takes too much" in refused[0][2] and sum(e is not None for e in encoded) == 1001
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0) == alarm
    with pytest.raises(ModelError, match="takes too much .*3 times"):
        encode_all(encoder, [row("open sesame")] * 5)


def test_memory_of_sound_rows_is_no_offence(tight) -> None:
    """What is kept between renderings may grow beyond what one of them may take."""
    kept = []
    with tight.watched():
        for _ in range(6):
            time.sleep(0.3)
            with tight.piece():
                kept.append(bytearray(3 << 24))
    assert sum(map(len, kept)) > tight.memory
