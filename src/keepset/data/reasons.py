"""Why a row or a file is refused: one literal table of reason codes, and the three things that carry them."""

from __future__ import annotations

from dataclasses import dataclass

from keepset.errors import DataError

#: Every code a reader or a dialect can give, with what it means to the user. Docs and reports print this table.
REASONS: dict[str, str] = {
    # --- whole files: raised as FileRefused
    "no-such-file": "the path is neither a file, a folder nor a hub dataset that could be read",
    "unreadable-file": "the operating system refused to read the file",
    "empty-file": "the file holds no row at all",
    "utf-16": "the text is UTF-16 or UTF-32; convert it to UTF-8 first",
    "not-gzip": "the name ends in .gz but the content is neither gzip nor JSON",
    "not-zstd": "the name ends in .zst but the content is neither Zstandard nor JSON",
    "not-parquet": "the name ends in .parquet but the content is not Parquet",
    "not-arrow": "the name ends in .arrow but the content is not an Arrow file or stream",
    "unknown-container": "not a container keepset reads (.jsonl .json .csv .parquet .arrow, .gz, .zst)",
    "corrupt-parquet": "the Parquet file is damaged",
    "corrupt-arrow": "the Arrow file is damaged",
    "archive-bomb": "the file unpacks to far more than a data file would",
    "no-header": "the CSV file has no usable header line",
    "unknown-dialect": "the columns fit none of the known dialects",
    "no-usable-row": "every row was quarantined",
    # --- the text of one row
    "bad-json": "the line is not JSON",
    "truncated-line": "the last row of the file stops in the middle",
    "truncated-archive": "the compressed stream is damaged or stops early; the rows before it were read",
    "trailing-data": "there is something after the end of the JSON array",
    "line-too-long": "one row is larger than 64 MiB",
    "invalid-utf8": "the row holds bytes that are not UTF-8",
    "control-character": "a string holds a raw control character",
    "nul-character": "a string holds a NUL character",
    "lone-surrogate": "a string holds half of a UTF-16 surrogate pair, which no tokenizer can encode",
    "duplicate-key": "an object holds the same key twice",
    "nan-number": "a number is NaN or infinite, which JSON has no word for",
    "huge-integer": "an integer does not fit in 64 bits; other readers change it silently",
    "too-deep": "the row is nested more than 64 levels deep",
    "not-an-object": "the row is not a JSON object with columns",
    "csv-columns": "the row has more or fewer fields than the header",
    "csv-quotes": "the quoting of a CSV row is broken",
    # --- columns
    "missing-column": "a column of the dialect is missing from the row",
    "null-field": "a needed field is null",
    "wrong-type": "a field has another type than the dialect's",
    "empty-prompt": "the prompt is empty or only white space",
    "empty-completion": "an answer is empty or only white space",
    # --- chats
    "empty-messages": "the list of messages is empty",
    "too-many-messages": "the row holds more than 10,000 messages",
    "unknown-role": "a message has a role keepset doesn't know",
    "no-assistant-turn": "no message is the assistant's, so nothing could be supervised",
    "last-turn-not-assistant": "the chat doesn't end on an assistant's turn",
    "same-role-twice": "two user or two assistant messages stand in a row",
    "system-not-first": "a system message stands after the first message",
    "tool-calls": "the row carries structured tool calls or tool definitions, which would be lost in rendering",
    "non-text-content": "a message holds an image, sound or other part that is not text",
    "chat-as-text": "a text holds a chat as JSON or Python text that can't be read as one",
    "message-tree": "the row is a message, or a tree, of OASST's; write each path through it as `messages`",
    # --- fields that change what a row means (docs/data.md)
    "two-system-texts": "a system column says something else than the chat's own system message",
    "two-prompts": "two columns hold different prompts",
    "not-trained": "the row, or every answer in it, is marked as not to be trained on",
    "trained-prompt": "a message that is not the assistant's is marked as trained on",
    "fractional-weight": "a weight is neither 0 nor 1",
    "bad-weight": "the column that `--weight_column` names holds no number of 0 or more",
    "undesirable": "the row is an answer that is not wanted (`label: false` of unpaired preference data)",
    "reasoning-field": "a message holds reasoning beside its content, which not every template renders",
    "unused-field": "a field changes what is trained or rendered in a way that keepset doesn't follow",
    # --- pairs
    "identical-pair": "chosen and rejected are the same",
    "different-prompts": "chosen and rejected do not start from the same prompt",
    "score-tie": "both answers have the same score, so neither is preferred",
    "label-against-scores": "the label prefers the answer with the lower score",
}

EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was not used: where it stands, the code of `REASONS`, and the first 200 characters of it."""

    file: str
    line: int
    reason: str
    detail: str
    excerpt: str


def one_line(text: str) -> str:
    """Return a text with line breaks, terminal escapes and the like as spaces: data may stand in any message."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


class RowProblem(Exception):
    """Raised while one row is read or converted; the reader turns it into a `Quarantined`."""

    def __init__(self, reason: str, detail: str) -> None:
        """Take a code of `REASONS` and one line that names the field."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = one_line(detail)


class FileRefused(DataError):
    """A file that can't be used at all, or the first bad row under `strict`."""

    def __init__(
        self, file: str, reason: str, detail: str, *, line: int = 0, quarantine: tuple[Quarantined, ...] = ()
    ) -> None:
        """Take the place, a code of `REASONS` and one line with the fix; `line` 0 means the whole file."""
        place = f"{file}:{line}" if line else file
        super().__init__(one_line(f"{place}: {detail} [{reason}]"))
        self.file = file
        self.line = line
        self.reason = reason
        self.quarantine = quarantine


def excerpt(text: str | bytes) -> str:
    """Return at most 200 printable characters of a row, for people to recognise it by."""
    if isinstance(text, bytes):
        text = text[: 4 * EXCERPT].decode("utf-8", "replace")
    return one_line(text[:EXCERPT].replace("\ufffd", "?")).strip()
