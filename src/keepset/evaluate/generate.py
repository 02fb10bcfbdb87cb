"""Batched generation from message prompts, and AlpacaEval's `model_outputs.json`.

The prompt's tokens are those the model was trained on: a row with a one-letter answer is encoded as for training and
cut before that letter. That serves every template, also one without a generation prompt; what a template writes before
an answer (an empty thinking block, gpt-oss's final channel) is the prompt's here. Spaces at the cut go as well: they
belong to the answer's first token. The token that ends a turn is read from the same row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keepset.errors import DataError
from keepset.model.encode import RowRefused
from keepset.runfolder.files import write_atomic

Message = Mapping[str, str]


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: without special tokens, stripped.
        n_tokens: tokens generated, the end of turn included.
        finished: False if `max_new_tokens` cut it.
    """

    text: str
    n_tokens: int
    finished: bool


def prompt_ids(encoder: Any, prompt: Sequence[Message]) -> tuple[np.ndarray, int | None]:
    """Return a prompt's tokens (L,) and the first token that ends the answer's turn (None if the template writes none).

    Raises:
        keepset.model.encode.RowRefused: the template refuses the prompt, or it is too long.
    """
    row = encoder.encode_pair(list(prompt), [{"role": "assistant", "content": "A"}])
    supervised = [int(t) for t in np.flatnonzero(row.supervised) if t not in row.ends]
    cut = next(t for t in reversed(supervised) if "A" in encoder.tokenizer.decode([int(row.input_ids[t])]))
    while cut > 1 and not encoder.tokenizer.decode([int(row.input_ids[cut - 1])]).strip(" "):
        cut -= 1
    return np.asarray(row.input_ids[:cut]), int(row.input_ids[row.ends[0]]) if row.ends else None


def generate(
    model: Any,
    encoder: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Answer every prompt, greedily unless `temperature` is positive; the order is kept.

    Prompts of similar length run together, padded on the left. `batch_size` prompts of similar length run together,
    padded on the left; `advance` is told how many are done.

    Raises:
        DataError: a prompt that the template refuses or that leaves no room in the model's context.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = encoder.tokenizer
    context = getattr(tokenizer, "keepset_context", None)
    tokens, ends = _encoded(encoder, prompts, context)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    device = next(model.parameters()).device
    results: list[Generated | None] = [None] * len(tokens)
    order = np.argsort([-len(t) for t in tokens], kind="stable")
    settings: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": pad, "eos_token_id": sorted(ends)}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            padded, mask = _left_padded([tokens[i] for i in chosen], pad)
            width = padded.shape[1]
            room = max_new_tokens if not context else min(max_new_tokens, context - width)
            config = GenerationConfig(max_new_tokens=room, **settings)
            out = model.generate(input_ids=padded.to(device), attention_mask=mask.to(device), generation_config=config)
            for row, i in enumerate(chosen):
                results[i] = _answer(out[row, width:].tolist(), ends, tokenizer)
            if advance:
                advance(len(chosen))
    return [r for r in results if r is not None]


def _encoded(
    encoder: Any, prompts: Sequence[Sequence[Message]], context: int | None
) -> tuple[list[np.ndarray], set[int]]:
    """Each prompt's tokens, and the tokens that end an answer."""
    tokens: list[np.ndarray] = []
    ends: set[int] = set() if encoder.tokenizer.eos_token_id is None else {encoder.tokenizer.eos_token_id}
    for i, prompt in enumerate(prompts):
        try:
            ids, end = prompt_ids(encoder, prompt)
        except RowRefused as refused:
            raise DataError(f"prompt {i + 1}: {refused}") from None
        tokens.append(ids)
        ends |= set() if end is None else {end}
    longest = max((len(t) for t in tokens), default=0)
    if context and longest + 1 > context:
        raise DataError(f"a prompt of {longest} tokens leaves no room in a context of {context}")
    return tokens, ends


def _left_padded(rows: list[np.ndarray], pad: int) -> tuple[Any, Any]:
    """Tokens (n, longest) int64, padded on the left, and the mask of those that are no padding."""
    import torch

    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for k, row in enumerate(rows):
        padded[k, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[k, width - len(row) :] = 1
    return padded, mask


def _answer(ids: list[int], ends: set[Any], tokenizer: Any) -> Generated:
    stop = next((k for k, token in enumerate(ids) if token in ends), None)
    body = ids if stop is None else ids[:stop]
    text = tokenizer.decode(body, skip_special_tokens=True).strip()
    return Generated(text, len(body) + (stop is not None), stop is not None)


def write_model_outputs(path: str | Path, generator: str, instructions: Sequence[str], outputs: Sequence[str]) -> None:
    """Write AlpacaEval's `model_outputs.json`, on which the official tool can be run.

    `generator` is the model's name in its leaderboard, `instructions` (n) stand there word for word as in AlpacaEval.

    Raises:
        ValueError: the two differ in number.
    """
    rows = [{"instruction": i, "output": o, "generator": generator} for i, o in zip(instructions, outputs, strict=True)]
    write_atomic(Path(path), (json.dumps(rows, ensure_ascii=False, indent=1) + "\n").encode())
