"""Rows of messages -> token ids and the mask of supervised tokens.

The chat template is rendered once over the whole row, and the assistant's text is found in the result by character
offsets; the prompt is never tokenised alone, because a merge across the boundary would shift the mask. How a span is
found (`template.py`):

1. For every sequence of roles the template is rendered once with placeholder contents: the literals between them are
the
   template's own text (the "skeleton", kept per role sequence).
2. The row's real rendering is walked along the skeleton: literal, content, literal, ... A template may strip contents
(Gemma,
   Llama 3); contents that steer the template are found once more with markers around them.
3. An answer that the template takes apart (Qwen3 and GLM write its thinking anew or drop it, DeepSeek drops it) stands
   between two control tokens, which no content holds; what stands there must be the answer, with at most one piece cut
   out, and is supervised as it is rendered. `Encoded.lost` says whether text was lost. Otherwise the row is refused
   (`template-refused`): a span that can't be found is never guessed.

A token is supervised if it holds at least one character of a supervised assistant content, if the template writes it
between the answer's header and the answer (an empty thinking block, gpt-oss's channel), or if it is (or stands between
the content and) the end of the turn: the control tokens that the template writes right after the answer, however many
(Cohere 2: two). A template that writes none has no supervised end of turn, unless the next role's marker is one (GLM).
Tests hold this against TRL's training templates.

Control tokens inside a message (`<|im_end|>` typed by a user) could fake a turn; such rows are refused
(`special-token-in-text`), since any rewriting would change what the model is trained on. An answer's own tags
(`<think>`) are no control tokens. Rows with the single role `text` are taken verbatim, special tokens included: BOS if
the tokenizer adds one, the text, EOS unless it stands there; every token after the first is supervised.

Models without a template get `PLAIN_TEMPLATE`. BOS stands once: templates write their own, so the tokenizer adds none.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepset.errors import DataError, ModelError
from keepset.model import template as templates
from keepset.model.template import DATE, PLAIN_TEMPLATE, RowRefused, Template
from keepset.recipe import ModelSpec

__all__ = [
    "PLAIN_TEMPLATE",
    "Encoded",
    "Encoder",
    "Rendered",
    "RowRefused",
    "content_only",
    "encode_all",
    "what_is_lost",
]

BATCH = 512
"""Rows tokenised by one call."""

Lost = Literal["", "earlier", "last"]


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Attributes:
        input_ids: (L,) int32.
        supervised: (L,) bool; supervised[t] says that the prediction of input_ids[t], made at t-1, counts. [0] is
        False.
        truncated: the row was cut at `max_length`.
        ends: positions of the supervised tokens that end a turn, in order.
        lost: whether the template drops text (thinking) of the last answer, or else of an earlier one.
        left_out: the role of the first message that the template does not write at all; empty if it writes them all.
        endless: the template writes no end of turn after the last supervised answer.
        twice: the template writes a thinking block before a supervised answer that brings its own.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool = False
    ends: tuple[int, ...] = ()
    lost: Lost = ""
    left_out: str = ""
    endless: bool = False
    twice: bool = False


def content_only(row: Encoded) -> Encoded:
    """The row without its end-of-turn tokens among the supervised ones.

    Raises:
        DataError: nothing else is supervised.
    """
    supervised = row.supervised.copy()
    supervised[list(row.ends)] = False
    if not supervised.any():
        raise DataError("a row's only supervised token ends its turn: leave it out, or drop `end_of_turn: false`")
    return replace(row, supervised=supervised, ends=())


def what_is_lost(rows: Iterable[Encoded]) -> list[str]:
    """A line each for the rows of which the template drops text, whole messages or the end of turn; else none."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(losses_of(row.lost, row.left_out, endless=row.endless, twice=row.twice))
    return loss_words(counts)


def losses_of(lost: Lost, left_out: str, *, endless: bool, twice: bool, truncated: bool = False) -> list[str]:
    """What a row loses, as names that are counted; see `Encoded`."""
    names = [lost, f"no {left_out}" if left_out else "", "endless" if endless else "", "twice" if twice else ""]
    return [name for name in names if name]


def loss_words(counts: Counter[str]) -> list[str]:
    """A line for each kind of loss, from how many rows have it."""
    names = {"earlier": "earlier answers", "last": "the last answer"}
    words_of = {
        **{k: f"drops text (thinking) of {name}; what it leaves is supervised" for k, name in names.items()},
        **{
            k: f"does not write a {k[3:]} message; they are scored without it"
            for k in sorted(counts)
            if k.startswith("no ")
        },
        "twice": "writes a thinking block of its own before the answer's; both are supervised",
        "endless": "writes no end of turn after the answer; a model trained on them does not learn to stop",
    }
    return [f"{counts[kind]} rows: the chat template {words}" for kind, words in words_of.items() if counts[kind]]


@dataclass(frozen=True)
class Rendered:
    """A row as text; spans are (start, end, first, last): a supervised answer and its end of turn, in characters."""

    text: str
    spans: list[tuple[int, int, int, int]]
    every_token: bool = False
    lost: Lost = ""
    left_out: str = ""
    twice: bool = False


class Encoder:
    """Turns messages into `Encoded` rows for one tokenizer and one `ModelSpec`."""

    def __init__(self, tokenizer: Any, spec: ModelSpec, *, context: int | None = None) -> None:
        """Read the template and the special tokens.

        The tokenizer is a fast one (offsets are needed). `context` is the model's longest input, to which `max_length`
        is cut; default: what `load_tokenizer` noted.

        Raises:
            ModelError: a slow tokenizer, a template file that can't be read, a plain template without an EOS token,
                a template that takes too long, or that writes a token beyond the model's embedding.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the tokenizer gives no character offsets (a slow one); convert it to a fast tokenizer")
        self.tokenizer = tokenizer
        self.spec = spec
        context = context or getattr(tokenizer, "keepset_context", None)
        self.max_length = min(spec.max_length, context or spec.max_length)
        automatic = tokenizer("", add_special_tokens=True)["input_ids"]
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in automatic[:1]
        self.template = self._read_template()
        self._turns = Template(self.template, tokenizer, start=tokenizer.bos_token if self.adds_bos else "")
        self._control_ids = tokenizer.convert_tokens_to_ids(sorted(self._turns.tokens))
        self._check_vocabulary(self._control_ids, ModelError)

    def _check_vocabulary(self, ids: Any, refuse: Callable[[str], Exception]) -> None:
        """Raise `refuse(why)` if an id has no row in the model's embedding (`keepset_vocabulary`)."""
        size = getattr(self.tokenizer, "keepset_vocabulary", None)
        if size is not None and len(ids) and (most := int(np.max(ids))) >= size:
            word = self.tokenizer.convert_ids_to_tokens(most)
            raise refuse(f"{word!r} is token {most} of the tokenizer's {len(self.tokenizer)}; the embedding has {size}")

    def _read_template(self) -> str:
        chosen, own = self.spec.chat_template, self.tokenizer.chat_template
        if isinstance(own, Mapping):
            if chosen is None and "default" not in own:
                raise ModelError(
                    f"the tokenizer has the chat templates {', '.join(sorted(own))} and none called default; "
                    "write one to a file and give it as chat_template"
                )
            own = own.get("default")
        if chosen is not None and chosen != "plain":
            try:
                return Path(chosen).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(
                    f"chat_template {chosen}: can't be read: {error}; give a Jinja file or `plain`"
                ) from None
        if chosen is None and own:
            return str(own)
        if self.tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no EOS token, which the plain-text template ends a turn with")
        return PLAIN_TEMPLATE

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the tokenizer, the template and the options that change tokens or mask."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        options = [self.template, DATE, self.spec.supervise, self.max_length, self.spec.overlong, self.adds_bos, 1]
        turns = self._turns
        if turns.dissects or turns.header or len(turns.ends) != 1 or turns.tells_date:
            options.append(2)  # earlier versions gave other dates, refusals or masks
        added = self.tokenizer.added_tokens_decoder
        if any(t.rstrip or t.lstrip for i, t in added.items() if i in self._control_ids):
            options.append(3)  # earlier versions supervised a header that swallows blanks
        digest = hashlib.sha256(json.dumps(options).encode())
        digest.update(backend.to_str().encode())
        return digest.hexdigest()

    def render(self, messages: Sequence[Mapping[str, str]], *, n_prompt: int = 0) -> Rendered:
        """Render a row and find its supervised spans.

        Of an answer with `train: False`, and of the first `n_prompt` messages, nothing is supervised.

        Raises:
            RowRefused: template-refused, special-token-in-text, no-supervised-token.
        """
        if len(messages) == 1 and messages[0]["role"] == "text":
            return self._plain_text(messages[0]["content"])
        for i, message in enumerate(messages):
            fake = self._turns.control.search(message["content"])
            if fake:
                raise RowRefused(
                    "special-token-in-text", f"message {i + 1} ({message['role']}) holds the special token {fake[0]}"
                )
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= n_prompt]
        asked = [i for i in asked if messages[i].get("train", True)]
        if self.spec.supervise == "last":
            asked = asked[-1:]
        if not any(messages[i]["content"].strip() for i in asked):
            raise RowRefused("no-supervised-token", "no assistant message with text to supervise")
        text = self._turns.render(messages)
        places, lost = self._turns.places(text, messages)
        spans, twice = [], False
        for i in asked:
            spots = [n for n, place in enumerate(places) if place[0] == i]
            if len(spots) != 1:
                raise RowRefused("template-refused", f"the chat template writes message {i + 1} {len(spots)} times")
            n = spots[0]
            _, start, end = places[n]
            literal = text[places[n - 1][2] if n else 0 : start]
            written = self._turns.written_before(literal) or 0
            if literal[len(literal) - written :].strip() or self._turns.own_tags.match(text, start):
                twice |= bool(self._turns.own_tags.match(text, start)) and bool(
                    self._turns.own_tags.search(literal, len(literal) - written)
                )
                start -= written
            reach = places[n + 1][1] if n + 1 < len(places) else len(text)
            first, last = self._turns.end_of_turn(text[end:reach]) or (0, 0)
            spans.append((start, end, end + first, end + last))
        if not any(text[start:end].strip() for start, end, _, _ in spans):
            raise RowRefused("no-supervised-token", "the chat template drops the whole answer")
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        written_ones = {i for i, _, _ in places}
        left_out = [m["role"] for i, m in enumerate(messages) if i not in written_ones and m["content"].strip()]
        lost_of: Lost = "" if not lost else "last" if answers[-1] in lost else "earlier"
        return Rendered(text, spans, lost=lost_of, left_out=next(iter(left_out), ""), twice=twice)

    def _plain_text(self, content: str) -> Rendered:
        if not content.strip():
            raise RowRefused("no-supervised-token", "the text is empty")
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token or ""
        text = content if not self.adds_bos or content.startswith(bos) else bos + content
        return Rendered(text if text.rstrip().endswith(eos) else text + eos, [], every_token=True)

    def _finish(self, rendered: Rendered, tokens: Any) -> Encoded:
        input_ids = np.asarray(tokens.ids, dtype=np.int32)
        supervised = np.zeros(len(input_ids), dtype=bool)
        turn_ends: list[int] = []
        if rendered.every_token:
            supervised[1:] = True
            last = len(input_ids) - 1
            turn_ends = [last] if last > 0 and input_ids[last] == self.tokenizer.eos_token_id else []
        else:
            places = np.asarray(tokens.offsets, dtype=np.int64).reshape(-1, 2)
            starts, ends = places[:, 0], places[:, 1]
            control = np.isin(input_ids, self._control_ids)
            for start, end, first, last in rendered.spans:
                # a control token may have swallowed the answer's blanks (Phi-3's `<|assistant|>` is `rstrip`)
                supervised |= (starts < end) & (ends > start) & ~(control & ((starts < start) | (ends > end)))
                inside = np.flatnonzero((starts < last) & (ends > first))
                if len(inside):  # and blanks that the template puts before it (Llama 2)
                    supervised[min(np.searchsorted(starts, end), inside[0]) : inside[-1] + 1] = True
                    turn_ends += range(inside[0], inside[-1] + 1)
        supervised[:1] = False
        n, truncated = len(input_ids), False
        if n > self.max_length:
            if self.spec.overlong == "quarantine":
                raise RowRefused("over-long", f"{n} tokens, max_length is {self.max_length}")
            input_ids, supervised, truncated = input_ids[: self.max_length], supervised[: self.max_length], True
            turn_ends = [t for t in turn_ends if t < self.max_length]
        self._check_vocabulary(input_ids, lambda why: RowRefused("token-beyond-embedding", why))
        if not supervised.any():
            after = f" in the first {self.max_length} tokens" if truncated else ""
            raise RowRefused("no-supervised-token", f"no supervised token{after}")
        endless = bool(rendered.spans) and rendered.spans[-1][2] == rendered.spans[-1][3]
        return Encoded(
            input_ids,
            supervised,
            truncated,
            tuple(turn_ends),
            rendered.lost,
            rendered.left_out,
            endless,
            rendered.twice,
        )

    def _tokenise(self, texts: list[str]) -> list[Any]:
        """Return tokenizers' own encodings: transformers' lists of lists would cost a fifth more."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend.encode_batch(texts, add_special_tokens=False)

    def encode(self, messages: Sequence[Mapping[str, str]], *, n_prompt: int = 0) -> Encoded:
        """Encode one row; the first `n_prompt` messages are never supervised.

        Raises:
            RowRefused: the row can't be supervised, or is too long.
        """
        with templates.LIMITS.watched():
            rendered = self.render(messages, n_prompt=n_prompt)
        return self._finish(rendered, self._tokenise([rendered.text])[0])

    def encode_pair(self, prompt: Sequence[Mapping[str, str]], completion: Sequence[Mapping[str, str]]) -> Encoded:
        """Encode prompt + completion with only the completion supervised."""
        return self.encode([*prompt, *completion], n_prompt=len(prompt))


def encode_all(
    encoder: Encoder, rows: Iterable[Sequence[Mapping[str, str]]]
) -> tuple[list[Encoded | None], list[tuple[int, str, str]]]:
    """Encode many rows, tokenising in batches.

    Returns:
        One entry a row in order (None: refused), and (index, reason, detail) of each refused row.
    """
    out: list[Encoded | None] = []
    refused: list[tuple[int, str, str]] = []
    waiting: list[tuple[int, Rendered]] = []
    running: list[tuple[list[tuple[int, Rendered]], Future[list[Any]]]] = []

    def collect() -> None:
        for batch, future in running:
            for (i, rendered), tokens in zip(batch, future.result(), strict=True):
                try:
                    out[i] = encoder._finish(rendered, tokens)
                except RowRefused as error:
                    refused.append((i, error.reason, error.detail))
        running.clear()

    # The tokenizer works without Python's lock, so one batch is tokenised while the next is rendered.
    with ThreadPoolExecutor(1) as tokeniser, templates.LIMITS.watched():

        def flush() -> None:
            future = tokeniser.submit(encoder._tokenise, [rendered.text for _, rendered in waiting])
            collect()
            running.append((waiting.copy(), future))
            waiting.clear()

        for i, messages in enumerate(rows):
            out.append(None)
            try:
                waiting.append((i, encoder.render(messages)))
            except RowRefused as error:
                refused.append((i, error.reason, error.detail))
            if len(waiting) >= BATCH:
                flush()
        flush()
        collect()
    return out, sorted(refused)
