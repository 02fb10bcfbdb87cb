"""Rows of JSON Lines, of a JSON array, and of JSON objects one after another, streamed: at most one row is held."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from keepset.data.jsontext import parse_row
from keepset.data.reasons import Quarantined, RowProblem, excerpt
from keepset.data.streams import MAX_ROW, StreamDamaged, skip_bom

#: One row as read: its line (1-based), its JSON text, and the object.
RawRow = tuple[int, str, dict[str, Any]]

_CHUNK = 2**20
#: White space of JSON, and the byte-order mark: one stands before each file of several that were put together.
_AROUND = " \t\r\n\ufeff"


def read_json(stream: io.BufferedReader, file: str) -> Iterator[RawRow | Quarantined]:
    """Yield the rows of a JSON or JSON Lines stream; which of the two it is goes by its content.

    A file whose first line is a whole JSON value is read line by line, unless that line is one array and all there is.
    """
    skip_bom(stream)
    line = 1
    first = b""
    try:
        while not first.strip():
            first = stream.readline(MAX_ROW + 1)
            if not first:
                return
            if not first.strip():
                line += 1
    except StreamDamaged as error:
        yield Quarantined(file, line, "truncated-archive", str(error), "")
        return
    start = first.lstrip()[:1]
    if (start == b"[" and not _is_line_of_lines(first, stream)) or (start == b"{" and _is_spread(first, stream)):
        yield from _Elements(stream, file, first, line, array=start == b"[").rows()
    else:
        yield from _lines(stream, file, first, line)


def _is_line_of_lines(first: bytes, stream: io.BufferedReader) -> bool:
    """Tell whether a line that starts with `[` is one (bad) row among lines: a whole value with something after it."""
    closed = first.rstrip().endswith(b"]")
    return closed and stream.peek(1)[:64].strip()[:1] not in (b"", b"]", b",")


def _is_spread(first: bytes, stream: io.BufferedReader) -> bool:
    """Tell whether a first line that starts with `{` opens an object that is spread over several lines."""
    text = first.strip()
    if text != b"{" and not text.endswith(b","):
        return False
    return stream.peek(1)[:256].lstrip()[:1] == b'"'


def _lines(stream: io.BufferedReader, file: str, first: bytes, line: int) -> Iterator[RawRow | Quarantined]:
    readline = stream.readline
    data = first
    limit = MAX_ROW + 1
    while data:
        problem = None
        try:
            if len(data) == limit and not data.endswith(b"\n"):
                problem = ("line-too-long", f"the line is longer than {MAX_ROW >> 20} MiB")
                while (more := readline(_CHUNK)) and not more.endswith(b"\n"):
                    pass
            else:
                text = data.decode("utf-8").strip(_AROUND)
                if text:
                    yield line, text, parse_row(text)
        except UnicodeDecodeError as error:
            problem = ("invalid-utf8", f"byte 0x{data[error.start]:02x} at {error.start + 1} is not UTF-8")
        except RowProblem as bad:
            problem = (bad.reason, bad.detail)
            if b"\r" in data.strip() and b"\n" not in data.strip():
                problem = (bad.reason, "lines end in CR alone (old Mac): convert them: tr '\\r' '\\n' < OLD > NEW")
            elif bad.reason != "bad-json" or "the JSON value" in bad.detail:
                pass  # not JSON, or more than one value
            elif not data.endswith(b"\n") and data.lstrip()[:1] == b"{":
                problem = ("truncated-line", f"the file stops in the middle of its last row: {bad.detail}")
        except StreamDamaged as error:
            problem = ("truncated-archive", str(error))
        if problem:
            yield Quarantined(file, line, *problem, excerpt(data))
        line += 1
        try:
            data = readline(limit)
        except StreamDamaged as error:
            yield Quarantined(file, line, "truncated-archive", str(error), "")
            return


_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\],]', re.DOTALL)
_SPACE = re.compile(rb"(?:[ \t\r\n]|\xef\xbb\xbf)*+")
_INDENT = re.compile(rb"\n([ \t]*)\{")


class _Elements:
    """Cut a JSON array (or objects one after another) into its elements without parsing the whole.

    A scan over brackets and strings finds where an element ends. After an element that is not JSON (a lost quote
    turns all that follows inside out) it starts again at the next line that opens an object at the usual indent.

    `json.JSONDecoder.raw_decode` over a growing buffer, tried, read sound arrays in 0.7 of the time in 20 lines less,
    but it can't tell where a broken element ends: a spare comma in one of many rows on a line made three bad rows of
    one, so that rows in were no longer rows out; and one element of 60 MB peaked 60 MiB higher.
    """

    def __init__(self, stream: io.BufferedReader, file: str, first: bytes, line: int, *, array: bool) -> None:
        self.stream, self.file, self.array = stream, file, array
        self.buffer, self.line = first, line
        self.at = self.buffer.index(b"[") + 1 if array else 0
        self.counted = 0  # `line` is the line of this position
        self.ended = False
        self.indent: bytes | None = None
        self.damage: str | None = None

    def more(self, keep_from: int) -> int:
        """Read on, dropping what stands before `keep_from`; return how far positions moved."""
        self._line_at(keep_from)
        self.counted -= keep_from
        try:
            data = self.stream.read1(_CHUNK)
        except StreamDamaged as error:
            self.damage, data = str(error), b""
        self.ended = not data
        self.buffer = self.buffer[keep_from:] + data
        return keep_from

    def rows(self) -> Iterator[RawRow | Quarantined]:
        """Yield the elements."""
        while True:
            start = self._skip_space()
            if start is None:
                if self.damage:
                    yield Quarantined(self.file, self._line_at(self.at), "truncated-archive", self.damage, "")
                elif self.array:
                    detail = "the file stops before the array's closing ]"
                    yield Quarantined(self.file, self._line_at(self.at), "truncated-line", detail, "")
                return
            if self.array and self.buffer[start : start + 1] == b"]":
                self.at = start + 1
                yield from self._after()
                return
            if self.buffer[start : start + 1] == b",":
                self.at = start + 1
                continue
            start, end = self._element(start)
            line = self._line_at(start)
            if end is None:
                yield from self._broken(start, line)
                continue
            data = self.buffer[start:end].strip()
            if end - start > MAX_ROW:
                detail = f"the element is larger than {MAX_ROW >> 20} MiB"
                yield Quarantined(self.file, line, "line-too-long", detail, excerpt(data))
                self.at = end
                continue
            try:
                text = data.decode("utf-8")
                row = parse_row(text)
            except UnicodeDecodeError:
                yield Quarantined(self.file, line, "invalid-utf8", "the element is not UTF-8", excerpt(data))
                self.at = end
            except RowProblem as bad:
                yield Quarantined(self.file, line, bad.reason, bad.detail, excerpt(data))
                again = self._resync(start, end) if bad.reason in ("bad-json", "control-character") else None
                self.at = end if again is None else again
            else:
                if self.indent is None:
                    before = self.buffer.rfind(b"\n", 0, start)
                    self.indent = self.buffer[before + 1 : start] if before >= 0 else b""
                self.at = end
                if "\n" in text or "\r" in text:  # spread over lines; a raw row must fit on one
                    text = json.dumps(row, ensure_ascii=False)
                yield line, text, row

    def _line_at(self, position: int) -> int:
        """Return the line of a position; positions asked for only ever grow."""
        if position > self.counted:
            self.line += self.buffer.count(b"\n", self.counted, position)
            self.counted = position
        return self.line

    def _skip_space(self) -> int | None:
        while True:
            match = _SPACE.match(self.buffer, self.at)
            start = match.end() if match else self.at
            if start < len(self.buffer):
                return start
            if self.ended:
                return None
            # the last line break stays, so that an element's indent can be seen
            self.at = start
            self.at -= self.more(max(self.buffer.rfind(b"\n"), 0))

    def _element(self, start: int) -> tuple[int, int | None]:
        """Find where the element that starts here ends; None if the file ends or the element is past all bounds."""
        position, level, inside = start, 0, False
        while True:
            if inside:  # a string that was cut off where the buffer ended
                match = _INSIDE.match(self.buffer, position)
                position = match.end() if match else position
                if self.buffer[position : position + 1] == b'"':
                    inside = False
                    position += 1
                    continue
            else:
                for match in _MARK.finditer(self.buffer, position):
                    mark = match[0]
                    position = match.end()
                    if len(mark) > 1:
                        continue
                    if mark == b",":
                        if not level:
                            return start, position - 1
                    elif mark == b'"':
                        inside = True
                        break
                    elif mark in b"{[":
                        level += 1
                    elif not level:
                        if mark == b"]":  # of the array itself
                            return start, position - 1 if position - 1 > start else position
                    else:
                        level -= 1
                        if not level and not self.array:
                            return start, position
                else:
                    position = len(self.buffer)
                if inside:
                    continue
            if self.ended and not level and not inside:
                return start, len(self.buffer)
            if self.ended or len(self.buffer) - start > MAX_ROW + _CHUNK:
                return start, None
            moved = self.more(start)
            start, position = start - moved, position - moved

    def _resync(self, start: int, end: int) -> int | None:
        """Return where the next element opens after a broken one, at the indent the elements before it had."""
        position = start
        while match := _INDENT.search(self.buffer, position + 1):
            opens = match.start() + 1
            if self.indent is None or match[1] == self.indent:
                # an element that does end on its own brace was cut out rightly, however bad it is
                return end if opens >= end and self.buffer[start:end].rstrip().endswith(b"}") else opens
            position = match.start()
        return None

    def _broken(self, start: int, line: int) -> Iterator[Quarantined]:
        """Tell of an element that never ends, and go on at the next one if that can be found."""
        again = self._resync(start, len(self.buffer))
        data = self.buffer[start:again]
        if again is not None:
            yield Quarantined(self.file, line, "bad-json", "the element is broken off or its quotes are", excerpt(data))
            self.at = again
            return
        if self.damage:
            yield Quarantined(self.file, line, "truncated-archive", self.damage, excerpt(data))
        elif self.ended:
            yield Quarantined(self.file, line, "truncated-line", "the file stops in the middle of a row", excerpt(data))
        else:
            detail = f"the element is larger than {MAX_ROW >> 20} MiB; nothing after it could be read"
            yield Quarantined(self.file, line, "line-too-long", detail, excerpt(data))
        self.buffer, self.at, self.ended, self.array = b"", 0, True, False
        self.stream = io.BufferedReader(io.BytesIO(b""))

    def _after(self) -> Iterator[Quarantined]:
        start = self._skip_space()
        if start is not None:
            detail = "something follows the array's closing ]; of several files put together, give each by itself"
            yield Quarantined(
                self.file, self._line_at(start), "trailing-data", detail, excerpt(self.buffer[start : start + 400])
            )
        elif self.damage:
            yield Quarantined(self.file, self._line_at(self.at), "truncated-archive", self.damage, "")
