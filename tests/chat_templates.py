"""Chat templates of several model families on the tiny tokenizer."""

from __future__ import annotations

from conftest import CHATML, tiny_tokenizer
from keepset.model.encode import Encoder
from keepset.recipe import ModelSpec

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ first if loop.first else '' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# template, special tokens it needs, end-of-turn token, does it strip contents, can it take a system message
TEMPLATES = {
    "chatml": (CHATML, [], "<|im_end|>", False, True),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", True, True),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", True, True),
    "mistral": (MISTRAL, [], "<|im_end|>", False, False),
    "plain": (None, [], "<|im_end|>", False, True),
}
_encoders: dict[tuple[str, str], Encoder] = {}


def encoder_for(name: str, **changes: object) -> Encoder:
    key = (name, str(changes))
    if key not in _encoders:
        template, special, *_ = TEMPLATES[name]
        tokenizer = tiny_tokenizer(template)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        _encoders[key] = Encoder(tokenizer, ModelSpec(**{"max_length": 4096, **changes}))
    return _encoders[key]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    rows = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *rows] if system is not None else rows
