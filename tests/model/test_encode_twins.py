"""The supervised mask against TRL's training templates, whose `{% generation %}` blocks mark what a model writes.

TRL ships each template as its authors wrote it and, for most, a twin with those blocks. Ours reads the first alone.
Every answer's supervised text must be the twin's, but for what `DEVIATIONS` says, and blanks: TRL's blocks often hold
the line break after the end of turn or before the answer, which ours leaves out.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

import trl
from tokenizers import AddedToken

from conftest import tiny_tokenizer
from keepset.model.encode import Encoder, RowRefused, content_only, what_is_lost
from keepset.model.template import clock
from keepset.recipe import ModelSpec

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(f.stem for f in FOLDER.glob("*.jinja") if not f.stem.endswith("_training"))
TWIN = {
    name: twin
    for name in NAMES
    for twin in (name, f"{name}_training")
    if (file := FOLDER / f"{twin}.jinja").exists() and re.search(r"{%-?\s*generation", file.read_text(encoding="utf-8"))
}
ENDS = {"gemma4": "<turn|>", "llama3_": "<|eot_id|>"}
"""The end of turn of the templates without a twin, by the beginning of their names."""
TOKENS = re.compile(
    r"<\|[^|<>\s']+\|?>|<[^|<>\s']+\|>|<｜[^｜']+｜>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_\w+>"
    r"|\[gMASK\]|<sop>|</s>"
)
EOS = {"deepseek": "<｜end▁of▁sentence｜>", "llava": "</s>", "cohere": "<|END_OF_TURN_TOKEN|>"}
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
"""Templates for lists of text and images, which refuse or drop plain text: so do we."""


def encoder_for(name: str) -> Encoder:
    """A tiny tokenizer with the tokens that stand in the template; tags of answers are added but not special."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(source)
    eos = next((token for start, token in EOS.items() if name.startswith(start)), "<eos>")
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": eos})
    tokenizer.add_tokens(
        [AddedToken(t, special="|" in t, normalized=False) for t in dict.fromkeys(TOKENS.findall(source))]
    )
    return Encoder(tokenizer, ModelSpec(max_length=20_000))


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    rows = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *rows] if system else rows


def runs(encoder: Encoder, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    return [encoder.tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


def ours(encoder: Encoder, messages: list[dict[str, str]]) -> list[str]:
    row = encoder.encode(messages)
    found = runs(encoder, row.input_ids, row.supervised)
    assert [text.rstrip() for text in found] == found
    return [text.strip() for text in found]


def theirs(name: str, encoder: Encoder, messages: list[dict[str, str]]) -> list[str]:
    source = (FOLDER / f"{TWIN[name]}.jinja").read_text(encoding="utf-8")
    with clock(source, datetime(2024, 7, 26).strftime):
        out = encoder.tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    return runs(encoder, np.asarray(out["input_ids"]), np.asarray(out["assistant_masks"]))


BLOCK = re.compile(r"<think>.*?</think>\s*", re.S)


def no_role(marker: str):
    return lambda text, last: text.removeprefix(marker)


def no_earlier_block(text: str, last: bool) -> str:
    return text if last else BLOCK.sub("", text)


DEVIATIONS = {
    # the role's marker is the prompt's, not the model's
    "deepseek_r1_distill": lambda text, last: BLOCK.sub("", text.removeprefix("<｜Assistant｜>")),  # drops all thinking
    "deepseekv3": no_role("<｜Assistant｜>"),
    "gptoss": no_role("<|start|>assistant"),
    "muse_glimmer": no_role("<|start|>assistant"),
    # the original closes no last turn
    "glm4moe": lambda text, last: text.removesuffix("<|user|>").rstrip() if last else text,
    # the original writes no thinking into earlier answers
    **dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"), no_earlier_block),
}
THOUGHT = "<think>\nIt swims, so a fish.\n</think>\n\n{}"
TALKS = {
    "one": talk("Name a fish.", "Trout."),
    "two": talk("Name a fish.", "Trout.", "And a bird?", "The wren, that is.\n\nThat."),
    "system": talk("Name a fish.", "Trout.", "And a bird?", "Wren.", system="Be brief."),
    "thought": talk("Name a fish.", THOUGHT.format("Trout.")),
    "thoughts": talk("Name a fish.", THOUGHT.format("Trout."), "And a bird?", THOUGHT.format("Wren.")),
}


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", TWIN)
def test_what_is_supervised_is_what_trl_trains_on(name: str, kind: str) -> None:
    encoder, messages = encoder_for(name), TALKS[kind]
    if name in PARTS_ONLY or (name == "gemma" and kind == "system"):
        with pytest.raises(RowRefused, match="template-refused"):
            encoder.encode(messages)
        return
    want = theirs(name, encoder, messages)
    change = DEVIATIONS.get(name, lambda text, last: text)
    assert ours(encoder, messages) == [change(text.strip(), i == len(want) - 1).strip() for i, text in enumerate(want)]


@pytest.mark.parametrize("kind", ["one", "two", "system"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TWIN])
def test_templates_without_a_twin_against_a_search_for_the_answers(name: str, kind: str) -> None:
    encoder, messages = encoder_for(name), TALKS[kind]
    end = next(end for start, end in ENDS.items() if name.startswith(start))
    row = encoder.encode(messages)
    text = encoder.tokenizer.decode(row.input_ids)
    assert ours(encoder, messages) == [m["content"] + end for m in messages if m["role"] == "assistant"]
    assert all(found in text for found in ours(encoder, messages))


@pytest.mark.parametrize("name", sorted(set(NAMES) - PARTS_ONLY))
def test_without_its_ends_of_turns_a_row_keeps_the_answers_whole(name: str) -> None:
    """The same token inside an answer stays: places count, not ids."""
    encoder = encoder_for(name)
    row = encoder.encode(TALKS["two"])
    less = content_only(row)
    gone = encoder.tokenizer.convert_ids_to_tokens(row.input_ids[row.supervised & ~less.supervised])
    text = encoder.tokenizer.decode(row.input_ids[less.supervised])
    assert [t for t in row.ends if not row.supervised[t]] == []
    assert "Trout." in text and text.endswith("The wren, that is.\n\nThat.")
    want = {
        "cohere2": ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"] * 2,
        "glm4moe": ["<|user|>"],
        "gptoss": ["<|end|>", "<|return|>"],
        **dict.fromkeys(("phi3", "phi3_5"), ["<|end|>", "<|end|>", "Ċ", "<eos>"]),
    }
    assert gone == want[name] if name in want else len(gone) == 2 and len(set(gone)) == 1


def test_a_tool_turn_ends_an_answer_too() -> None:
    messages = talk("Two and two?", "Let me see.")
    messages += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
    first, second = ours(encoder_for("glm4moe"), messages)
    assert first.endswith("Let me see.\n<|observation|>") or first.endswith("Let me see.<|observation|>")
    assert second.endswith("Four.")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemma4")])
def test_thinking_between_other_tokens(name: str) -> None:
    """Gemma 4 takes its own channel out of every answer, wherever it stands."""
    encoder = encoder_for(name)
    messages = talk("Name a fish.", "It is <|channel>thought\nIt swims.\n<channel|>Trout.")
    assert ours(encoder, messages) == ["It is Trout.<turn|>"]
    assert encoder.encode(messages).lost == "last" and encoder.encode(TALKS["two"]).lost == ""


def test_a_thinking_block_before_the_answer_s_own_is_counted() -> None:
    """Qwen3.8 puts an empty block before every answer that has no `reasoning_content`; Qwen3 reads the answer's."""
    told = "1 rows: the chat template writes a thinking block of its own before the answer's; both are supervised"
    for name, want in (("qwen3_8", [told]), ("qwen3", [])):
        encoder = encoder_for(name)
        assert what_is_lost(encoder.encode(TALKS[kind]) for kind in ("one", "thought")) == want
