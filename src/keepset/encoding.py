"""Rows of messages -> token ids and the mask of supervised tokens.

The chat template is rendered once over the whole row, and the assistant's text is found in the result by character
offsets; the prompt is never tokenised alone, because a merge across the boundary would shift the mask. How a span is
found:

1. For every sequence of roles the template is rendered once with placeholder contents: the literals between them are
the
   template's own text (the "skeleton", kept per role sequence).
2. The row's real rendering is walked along the skeleton: literal, content, literal, ... A template may strip contents
(Gemma,
   Llama 3); anything else it does to them is tried once more with markers around the contents, and then the row is
   refused (`template-refused`): a span that can't be found is never guessed.

A token is supervised if it holds at least one character of a supervised assistant content, or if it is (or stands
between the content and) the end-of-turn token. Which token ends a turn is read from the template: the first special
token it writes after the last assistant content. A template that writes none has no supervised end of turn.

Special tokens inside a message (`<|im_end|>` typed by a user) could fake a turn; such rows are refused
(`special-token-in-text`), since any rewriting would change what the model is trained on. Rows with the single role
`text` are taken verbatim, special tokens included: BOS if the tokenizer adds one, the text, EOS unless it stands there;
every token after the first is supervised.

Models without a template get `PLAIN_TEMPLATE`. BOS stands once: templates write their own, so the tokenizer adds none.

Templates come with models and are untrusted: transformers renders them in a sandbox; here any error becomes a refusal
and so does an output out of proportion to the row, one that takes more than `LIMITS` allow in time or memory too (a
template that does so again and again is refused as a whole). `date_string` is fixed, as a template that prints today's
date (Llama 3) would give other scores tomorrow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keepset.bounded import Bounds, TookTooLong
from keepset.errors import DataError, ModelError
from keepset.recipe import ModelSpec

PLAIN_TEMPLATE = (
    "{{ start }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
)
"""For models without a template: `User: ...`, blank line, `Assistant: ...<eos>`; a system text stands bare at the top.
`start` is the BOS token if the tokenizer adds one by itself."""

DATE = "26 Jul 2024"
"""What templates that print a date get (Llama 3.1's own default)."""

MAX_OUTPUT = 1 << 20
"""A rendering may be this many characters longer than eight times its contents."""

LIMITS = Bounds(seconds=5.0, memory=1 << 29)
"""What one rendering may take."""

MOST_STOPPED = 3
"""A template that was stopped on this many rows is refused."""

BATCH = 512
"""Rows tokenised by one call."""


class RowRefused(Exception):
    """A row that can't become supervised tokens; it goes to the quarantine.

    Attributes:
        reason: kebab-case code: template-refused, special-token-in-text, no-supervised-token, over-long.
        detail: one line for the reader.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Keep both parts."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Attributes:
        input_ids: (L,) int32.
        supervised: (L,) bool; supervised[t] says that the prediction of input_ids[t], made at t-1, counts. [0] is
        False.
        truncated: the row was cut at `max_length`.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool = False


def content_only(row: Encoded, end_of_turn: int | None) -> Encoded:
    """The row without its end-of-turn tokens among the supervised ones.

    Raises:
        DataError: nothing else is supervised.
    """
    if end_of_turn is None:
        return row
    supervised = row.supervised & (row.input_ids != end_of_turn)
    if not supervised.any():
        raise DataError("a row's only supervised token ends its turn: leave it out, or drop `end_of_turn: false`")
    return Encoded(row.input_ids, supervised, row.truncated)


@dataclass(frozen=True)
class Rendered:
    """A row as text; spans are (start, end, reach): a supervised content, and how far its end of turn may stand."""

    text: str
    spans: list[tuple[int, int, int]]
    every_token: bool = False


def _variants(content: str) -> tuple[str, ...]:
    return content, content.strip(), content.rstrip(), content.lstrip()


class Encoder:
    """Turns messages into `Encoded` rows for one tokenizer and one `ModelSpec`."""

    def __init__(self, tokenizer: Any, spec: ModelSpec, *, context: int | None = None) -> None:
        """Read the template and the special tokens.

        Args:
            tokenizer: a fast transformers tokenizer (offsets are needed).
            spec: chat_template, supervise, max_length and overlong are used.
            context: the model's longest input, to which `max_length` is cut; default: what `load_tokenizer` noted.

        Raises:
            ModelError: a slow tokenizer, a template file that can't be read, a plain template without an EOS token,
                a template that takes too long.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError("the tokenizer gives no character offsets (a slow one); convert it to a fast tokenizer")
        self.tokenizer = tokenizer
        self.spec = spec
        context = context or getattr(tokenizer, "keepset_context", None)
        self.max_length = min(spec.max_length, context or spec.max_length)
        automatic = tokenizer("", add_special_tokens=True)["input_ids"]
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in automatic[:1]
        self.template = self._read_template()
        self._skeletons: dict[tuple[str, ...], tuple[list[str], list[int]] | None] = {}
        self._stopped = 0
        added = getattr(tokenizer, "added_tokens_decoder", {})
        with LIMITS.watched():
            literals = "".join(self._probe_literals())
        if self._stopped:  # on a few words: there is no row that it would serve
            raise ModelError("the chat template takes too much time or memory; refused")
        # The tokens that can make or end a turn: those the template writes, BOS and EOS. Not every special token
        # (Gemma has 6,249, `<mask>` among them) and not only special ones (a template may write any added token).
        control = {str(t): i for i, t in added.items() if str(t).strip() and str(t) in literals}
        for token in (tokenizer.bos_token, tokenizer.eos_token):
            if token:
                control[token] = tokenizer.convert_tokens_to_ids(token)
        self._control_ids = frozenset(control.values())
        self._control = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)) or r"(?!)")
        self.end_of_turn = self._find_end_of_turn()

    def _read_template(self) -> str:
        chosen, own = self.spec.chat_template, self.tokenizer.chat_template
        if isinstance(own, Mapping):
            own = own.get("default") or next(iter(own.values()))
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
        options = [self.template, DATE, self.spec.supervise, self.max_length, self.spec.overlong, self._adds_bos, 1]
        digest = hashlib.sha256(json.dumps(options).encode())
        digest.update(backend.to_str().encode())
        return digest.hexdigest()

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        size = sum(len(m["content"]) for m in messages)
        try:
            with LIMITS.piece():
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.template,
                    tokenize=False,
                    date_string=DATE,
                    start=self.tokenizer.bos_token if self._adds_bos else "",
                )
        except (TookTooLong, MemoryError) as error:
            self._stopped += 1
            first = str(error) or f"more than {LIMITS.memory >> 20} MiB"
            if self._stopped >= MOST_STOPPED:
                raise ModelError(
                    f"the chat template takes too much ({first}, {self._stopped} times); refused"
                ) from None
            raise RowRefused("template-refused", f"the chat template takes too much: {first}") from None
        except Exception as error:  # a template is the model author's program and may raise anything
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise RowRefused("template-refused", f"the chat template raised: {first[:200]}") from error
        if len(text) > 8 * size + MAX_OUTPUT:
            raise RowRefused("template-refused", f"the chat template turned {size} characters into {len(text)}")
        return str(text)

    def _probe_literals(self) -> list[str]:
        """Collect the template's own text around one question and answer, with and without a system line."""
        found: list[str] = []
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            skeleton = self._skeleton(roles)
            found += skeleton[0] if skeleton else []
        return found

    def _find_end_of_turn(self) -> int | None:
        skeleton = self._skeleton(("user", "assistant"))
        if skeleton is None or not skeleton[1] or skeleton[1][-1] != 1:
            return None
        ids = self.tokenizer(skeleton[0][-1], add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in self._control_ids), None)

    def _skeleton(self, roles: tuple[str, ...]) -> tuple[list[str], list[int]] | None:
        """Return the literals and, between each two of them, which message stands there; None: the template refuses."""
        if roles not in self._skeletons:
            marks = [f"kEEpsEt{i}mark" for i in range(len(roles))]
            try:
                text = self._render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
            except RowRefused:
                self._skeletons[roles] = None
            else:
                pieces = re.split(r"kEEpsEt(\d+)mark", text)
                self._skeletons[roles] = (pieces[::2], [int(i) for i in pieces[1::2]])
        return self._skeletons[roles]

    def _walk(self, text: str, contents: Sequence[str], roles: tuple[str, ...]) -> list[tuple[int, int, int]] | None:
        """Find (message, start, end) of every content in the rendering, or None if it does not follow the skeleton."""
        skeleton = self._skeleton(roles)
        if skeleton is None:
            return None
        literals, order = skeleton
        if not text.startswith(literals[0]):
            return None
        at, places = len(literals[0]), []
        for i, literal in zip(order, literals[1:], strict=True):
            for variant in _variants(contents[i]):
                end = at + len(variant)
                if text.startswith(variant, at) and text.startswith(literal, end):
                    break
            else:
                return None
            places.append((i, at, end))
            at = end + len(literal)
        return places if at == len(text) else None

    def _walk_marked(self, text: str, messages: Sequence[Mapping[str, str]]) -> list[tuple[int, int, int]] | None:
        """Find contents whose text steers the template: render them between markers and take the markers out again."""
        for clean in (str, str.strip):
            marked = [{**m, "content": f"\ue000{i}\ue001{clean(m['content'])}\ue002"} for i, m in enumerate(messages)]
            if any(c in m["content"] for m in messages for c in "\ue000\ue001\ue002"):
                return None
            try:
                pieces = re.split("\ue000(\\d+)\ue001([^\ue002]*)\ue002", self._render(marked))
            except RowRefused:
                return None
            plain, places = [pieces[0]], []
            at = len(pieces[0])
            for number, content, literal in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
                places.append((int(number), at, at + len(content)))
                plain += [content, literal]
                at += len(content) + len(literal)
            if "".join(plain) == text:
                return places
        return None

    def render(self, messages: Sequence[Mapping[str, str]], *, n_prompt: int = 0) -> Rendered:
        """Render a row and find its supervised spans.

        Args:
            messages: {"role", "content"} in order, an answer with `train: False` being context; or one of role `text`.
            n_prompt: the first n_prompt messages are never supervised.

        Raises:
            RowRefused: template-refused, special-token-in-text, no-supervised-token.
        """
        if len(messages) == 1 and messages[0]["role"] == "text":
            return self._plain_text(messages[0]["content"])
        for i, message in enumerate(messages):
            fake = self._control.search(message["content"])
            if fake:
                raise RowRefused(
                    "special-token-in-text", f"message {i + 1} ({message['role']}) holds the special token {fake[0]}"
                )
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= n_prompt]
        wanted = [i for i in wanted if messages[i].get("train", True)]
        if self.spec.supervise == "last":
            wanted = wanted[-1:]
        if not any(messages[i]["content"].strip() for i in wanted):
            raise RowRefused("no-supervised-token", "no assistant message with text to supervise")
        text = self._render(messages)
        contents = [m["content"] for m in messages]
        places = self._walk(text, contents, tuple(m["role"] for m in messages)) or self._walk_marked(text, messages)
        if places is None:
            raise RowRefused("template-refused", "the chat template changes the messages' text: no span can be found")
        spans = []
        for i in wanted:
            found = [n for n, place in enumerate(places) if place[0] == i]
            if len(found) != 1:
                raise RowRefused("template-refused", f"the chat template writes message {i + 1} {len(found)} times")
            _, start, end = places[found[0]]
            reach = places[found[0] + 1][1] if found[0] + 1 < len(places) else len(text)
            spans.append((start, end, reach))
        return Rendered(text, spans)

    def _plain_text(self, content: str) -> Rendered:
        if not content.strip():
            raise RowRefused("no-supervised-token", "the text is empty")
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token or ""
        text = content if not self._adds_bos or content.startswith(bos) else bos + content
        return Rendered(text if text.rstrip().endswith(eos) else text + eos, [], every_token=True)

    def _finish(self, rendered: Rendered, tokens: Any) -> Encoded:
        input_ids = np.asarray(tokens.ids, dtype=np.int32)
        supervised = np.zeros(len(input_ids), dtype=bool)
        if rendered.every_token:
            supervised[1:] = True
        else:
            places = np.asarray(tokens.offsets, dtype=np.int64).reshape(-1, 2)
            starts, ends = places[:, 0], places[:, 1]
            for start, end, reach in rendered.spans:
                supervised |= (starts < end) & (ends > start)
                self._add_end_of_turn(supervised, rendered.text, input_ids, starts, end, reach)
        supervised[:1] = False
        n, truncated = len(input_ids), False
        if n > self.max_length:
            if self.spec.overlong == "quarantine":
                raise RowRefused("over-long", f"{n} tokens, max_length is {self.max_length}")
            input_ids, supervised, truncated = input_ids[: self.max_length], supervised[: self.max_length], True
        if not supervised.any():
            after = f" in the first {self.max_length} tokens" if truncated else ""
            raise RowRefused("no-supervised-token", f"no supervised token{after}")
        return Encoded(input_ids, supervised, truncated)

    def _add_end_of_turn(
        self, supervised: np.ndarray, text: str, ids: np.ndarray, starts: np.ndarray, end: int, reach: int
    ) -> None:
        """Mark the end-of-turn token after a content, and blanks the template puts before it (Llama 2)."""
        if self.end_of_turn is None:
            return
        first = int(np.searchsorted(starts, end))
        for t in range(first, len(ids)):
            if starts[t] >= reach:
                return
            if ids[t] == self.end_of_turn:
                if not text[end : starts[t]].strip():
                    supervised[first : t + 1] = True
                return

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
        with LIMITS.watched():
            rendered = self.render(messages, n_prompt=n_prompt)
        return self._finish(rendered, self._tokenise([rendered.text])[0])

    def encode_pair(self, prompt: Sequence[Mapping[str, str]], completion: Sequence[Mapping[str, str]]) -> Encoded:
        """Encode prompt + completion with only the completion supervised."""
        return self.encode([*prompt, *completion], n_prompt=len(prompt))


def encode_all(
    encoder: Encoder, rows: Iterable[Sequence[Mapping[str, str]]], *, n_prompt: int = 0
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
    with ThreadPoolExecutor(1) as tokeniser, LIMITS.watched():

        def flush() -> None:
            future = tokeniser.submit(encoder._tokenise, [rendered.text for _, rendered in waiting])
            collect()
            running.append((waiting.copy(), future))
            waiting.clear()

        for i, messages in enumerate(rows):
            out.append(None)
            try:
                waiting.append((i, encoder.render(messages, n_prompt=n_prompt)))
            except RowRefused as error:
                refused.append((i, error.reason, error.detail))
            if len(waiting) >= BATCH:
                flush()
        flush()
        collect()
    return out, sorted(refused)
