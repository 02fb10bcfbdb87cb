"""A chat template: rendered within limits and on a fixed date, and what its own text says about turns.

Everything is read from renderings of placeholder contents: the literals between them are the template's own text (the
"skeleton", kept per role sequence). From those of one question and one answer come

* the control tokens, which can fake a turn: the added tokens that the template writes, BOS and EOS;
* the answers' own tags, which are none: what stands in the template's text as a closed pair with no content between
  (`<think>\\n\\n</think>`), or what it no longer writes if the answer brings it (`</think>` of DeepSeek-V3.1);
* the header of an answer, which is the prompt's: as far as the generation prompt agrees with what stands before an
  answer, and at most to the first own tag. What follows it (`<|channel|>final<|message|>`, an empty thinking block) is
  the model's to write;
* the end of a turn: the control tokens right after the answer, up to one that opens another turn.

Templates come with models and are untrusted: transformers renders them in a sandbox; here any error becomes a refusal
and so does an output out of proportion to the row, one that takes more than `LIMITS` allow in time or memory too (a
template that does so again and again is refused as a whole). `date_string` and `strftime_now` give a fixed date, as a
template that prints today's (Llama 3, gpt-oss, Granite) would give other scores tomorrow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from typing import Any

from keepset.data.bounded import Bounds, TookTooLong
from keepset.errors import ModelError, first_line

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

QUESTION = ("user", "assistant")
TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|◁[^◁▷\s]{1,40}▷")


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


Place = tuple[int, int, int]
"""(message, start, end): where a message's content stands in a rendering, in characters."""


class Template:
    """One chat template with one tokenizer.

    Attributes:
        tokens, control: the control tokens, and what finds them.
        own, own_tags: the answers' own tags, and what finds them.
        dissects: whether the template may take an answer apart.
        tells_date: whether it has asked for the date.
        header: the end of an answer's header, where something is written between it and the answer.
        ends: the text of the first, the first two, ... tokens that end the last turn.
        closers: tokens that may end an earlier turn where `ends` is not found.
    """

    def __init__(self, source: str, tokenizer: Any, *, start: str) -> None:
        """Render the probes.

        The tokenizer's special tokens are what the template may write; `start` is what `PLAIN_TEMPLATE` begins with.

        Raises:
            ModelError: a few words are enough to exceed `LIMITS`.
        """
        self.source, self.tokenizer, self.start = source, tokenizer, start
        self._skeletons: dict[tuple[str, ...], tuple[list[str], list[int]] | None] = {}
        self._stopped = 0
        self.tells_date = False
        with LIMITS.watched():
            self._probes = [s for r in (QUESTION, ("system", *QUESTION)) if (s := self.skeleton(r)) is not None]
            if self._stopped:  # on a few words: there is no row that it would serve
                raise ModelError("the chat template takes too much time or memory; refused")
            self.own = self._own_tags()
            self.dissects = bool(self.own or re.search(r"(split|partition|find|\.r?index)\(", source))
            # Not every special token (Gemma has 6,249, `<mask>` among them) and not only special ones (a template may
            # write any added token).
            always = {t for t in (tokenizer.bos_token, tokenizer.eos_token) if t}
            self.tokens = {t for t in self._added if self._count(t)} - self.own | always
            self.control = _any_of(self.tokens)
            self.own_tags = _any_of(self.own)
            self.header = self._find_header()
            self.ends, self.closers = self._find_ends()

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """Render a row; with `prompt` the generation prompt follows.

        Raises:
            RowRefused: template-refused.
            ModelError: `MOST_STOPPED` rows took too much.
        """
        size = sum(len(m["content"]) for m in messages)
        try:
            with LIMITS.piece(), self._fixed_date() if "strftime_now" in self.source else nullcontext():
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    date_string=DATE,
                    start=self.start,
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
            raise RowRefused("template-refused", f"the chat template raised: {first_line(error)}") from error
        if len(text) > 8 * size + MAX_OUTPUT:
            raise RowRefused("template-refused", f"the chat template turned {size} characters into {len(text)}")
        return str(text)

    def _fixed_date(self) -> AbstractContextManager[None]:
        def strftime_now(form: str) -> str:
            self.tells_date = True
            return datetime.strptime(DATE, "%d %b %Y").strftime(form)

        return clock(self.source, strftime_now)

    def skeleton(self, roles: tuple[str, ...]) -> tuple[list[str], list[int]] | None:
        """Return the literals and, between each two of them, which message stands there; None: the template refuses."""
        if roles not in self._skeletons:
            marks = [f"kEEpsEt{i}mark" for i in range(len(roles))]
            try:
                text = self.render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
            except RowRefused:
                self._skeletons[roles] = None
            else:
                pieces = re.split(r"kEEpsEt(\d+)mark", text)
                self._skeletons[roles] = (pieces[::2], [int(i) for i in pieces[1::2]])
        return self._skeletons[roles]

    # -- what the literals say ----------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return [str(t) for t in added if str(t).strip()]

    def _count(self, token: str) -> int:
        return sum(literal.count(token) for literals, _ in self._probes for literal in literals)

    @cached_property
    def _answered(self) -> list[str] | None:
        """The literals around a question and its answer: before, between, after; None if the template refuses."""
        skeleton = self.skeleton(QUESTION)
        return None if skeleton is None or skeleton[1] != [0, 1] else skeleton[0]

    def _own_tags(self) -> set[str]:
        """Tags and tokens of the template's text that belong into answers."""
        literals = [literal for around, _ in self._probes for literal in around]
        tags = {t for literal in literals for t in TAG.findall(literal)} | {t for t in self._added if self._count(t)}
        never = {self.tokenizer.bos_token, self.tokenizer.eos_token}
        own = set()
        for closing in tags:
            opening = closing.replace("/", "", 1)
            pair = {opening, closing}
            if len(pair & tags) == 2 and not pair & never and all(
                literal.count(opening) == literal.count(closing) for literal in literals
            ):  # fmt: skip
                own |= pair
        if self._answered is not None:
            before, between, after = self._answered
            for token in self._added:
                if token in between and token not in own | never and token not in before + after:
                    try:
                        text = self.render(_talk(QUESTION, ["hi", f"{token}\nkEEpsEt1mark"]))
                    except RowRefused:
                        continue
                    if "kEEpsEt1mark" in text and text.count(token) <= between.count(token):
                        own.add(token)
        return own

    def _find_header(self) -> str | None:
        """The end of an answer's header, from its last control token on; None: nothing is written after it."""
        if self._answered is None:
            return None
        between = self._answered[1]
        try:
            plain, asked = (self.render(_talk(("user",), ["kEEpsEt0mark"]), prompt=p) for p in (False, True))
        except RowRefused:
            plain = asked = ""
        prompt = asked.rpartition("kEEpsEt0mark")[2] if plain != asked else between
        header = os.path.commonprefix([prompt, between])
        own = self.own_tags.search(between)
        header = header[: own.start()] if own else header
        if not between[len(header) :].strip():
            return None
        last = [m.start() for m in self.control.finditer(header)] or [header.rstrip("\n").rfind("\n") + 1]
        return header[last[-1] :] or None

    def _find_ends(self) -> tuple[list[str], set[str]]:
        """The texts of one, two, ... end-of-turn tokens after the last answer, and the tokens that may end a turn."""
        if self._answered is None:
            return [], set()
        _, between, after = self._answered
        eos = self.tokenizer.eos_token
        first, *openers = self.control.findall(between) or [""]
        opening = {*openers, self.tokenizer.bos_token} - {eos}
        ends: list[str] = []
        at, closers = 0, {first}
        for token in self.control.finditer(after):
            if after[at : token.start()].strip() or (ends and token[0] in opening):
                break
            at = token.end()
            ends.append(after[:at])
            closers.add(token[0])
        if not self.control.search(after):  # GLM: the next role's marker ends a turn, a tool's too
            tool = self.skeleton((*QUESTION, "tool", "assistant"))
            marker = _any_of(set(self._added) - self.own).match(tool[0][2].lstrip()) if tool else None
            self.tokens |= {marker[0]} if marker else set()
            self.control = _any_of(self.tokens)
            closers = self.tokens - {self.tokenizer.bos_token} | {eos}
        return ends, closers

    def end_of_turn(self, literal: str) -> tuple[int, int] | None:
        """Where the tokens that end a turn begin and end in the text after an answer, in characters; None: nowhere."""
        fitting = [len(end) for end in self.ends if literal.startswith(end)]
        first = self.control.search(literal)
        if first is None or literal[: first.start()].strip():
            return None
        if fitting:
            return first.start(), fitting[-1]
        return (first.start(), first.end()) if first[0] in self.closers else None

    def written_before(self, literal: str) -> int | None:
        """How many of a literal's last characters, before an answer, follow the header; None: no header is found."""
        at = -1 if self.header is None else literal.rfind(self.header)
        return None if self.header is None or at < 0 else len(literal) - at - len(self.header)

    # -- where the contents stand -------------------------------------------------------------------------------

    def places(self, text: str, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Place], list[int]]:
        """Where every message stands in a row's rendering, and which answers lost some of their text.

        Raises:
            RowRefused: template-refused: a place can't be found for certain.
        """
        skeleton = self.skeleton(tuple(m["role"] for m in messages))
        walked = None if skeleton is None else _walk(text, [m["content"] for m in messages], *skeleton)
        if walked is None and skeleton is not None and self.dissects:
            walked = self._walk_turns(text, messages, *skeleton)
        walked = walked or self._walk_marked(text, messages)
        if walked is None:
            raise RowRefused("template-refused", "the chat template changes the messages' text: no span can be found")
        answers = [(i, text[a:b], messages[i]["content"]) for i, a, b in walked if messages[i]["role"] == "assistant"]
        changed = [(i, left, whole) for i, left, whole in answers if left.strip() != whole.strip()]
        return walked, [i for i, left, whole in changed if self._bare(left) != self._bare(whole)]

    def _walk_marked(self, text: str, messages: Sequence[Mapping[str, Any]]) -> list[Place] | None:
        """Find contents whose text steers the template: render them between markers and take the markers out again."""
        for clean in (str, str.strip):
            marked = [{**m, "content": f"\ue000{i}\ue001{clean(m['content'])}\ue002"} for i, m in enumerate(messages)]
            if any(c in m["content"] for m in messages for c in "\ue000\ue001\ue002"):
                return None
            try:
                pieces = re.split("\ue000(\\d+)\ue001([^\ue002]*)\ue002", self.render(marked))
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

    def _walk_turns(
        self, text: str, messages: Sequence[Mapping[str, Any]], literals: list[str], order: list[int]
    ) -> list[Place] | None:
        """Find answers that the template takes apart by the control tokens around them.

        No content holds a control token, so those of the rendering are the template's, and must be the skeleton's.
        Between two of them stands at most one message: another's content as it is; of an answer what the template
        left of it, in order and with at most one piece cut out, white space and own tags aside.
        """
        between = re.compile(f"({self.control.pattern})")
        marks = [f"\ue000{i}\ue001" for i in order] + [""]
        wanted = between.split("".join(a + b for a, b in zip(literals, marks, strict=True)))
        given = between.split(text)
        if wanted[1::2] != given[1::2]:
            return None
        places, at = [], 0
        for want, have in zip(wanted, given, strict=True):
            before, *rest = re.split("\ue000(\\d+)\ue001", want)
            if not rest:
                if want != have:
                    return None
            elif len(rest) > 2:
                return None
            else:
                i, after = int(rest[0]), rest[1]
                answer = messages[i]["role"] == "assistant"
                tag = self.own_tags.search(before) if answer else None
                start = tag.start() if tag else len(before)
                end = len(have) - len(after)
                if start > end or not have.startswith(before[:start]) or not have.endswith(after):
                    return None
                content, body = messages[i]["content"], have[start:end]
                if answer:
                    left, whole = self._bare(body), self._bare(content)
                    same = len(os.path.commonprefix([left, whole]))
                    if len(left) > len(whole) or not whole.endswith(left[same:]):
                        return None
                elif body not in _variants(content):
                    return None
                places.append((i, at + start, at + end))
            at += len(have)
        return places

    def _bare(self, text: str) -> str:
        return "".join(self.own_tags.sub("", text).split())


def _talk(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t))) or r"(?!)")


def _variants(content: str) -> tuple[str, ...]:
    return content, content.strip(), content.rstrip(), content.lstrip()


def _walk(text: str, contents: Sequence[str], literals: list[str], order: list[int]) -> list[Place] | None:
    """Find every content between the skeleton's literals, or None if the rendering does not follow it."""
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


@contextmanager
def clock(source: str, strftime_now: Callable[[str], str]) -> Iterator[None]:
    """Put a template's clock in place of transformers', which hands it over as a global of the Jinja environment."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(source).environment.globals
    before = names["strftime_now"]
    names["strftime_now"] = strftime_now
    try:
        yield
    finally:
        names["strftime_now"] = before
