"""Growing Arrow columns: rows are appended to plain lists and turned into a table chunk by chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from keepset.data.turns import CONTEXT, Turn
from keepset.row_ids import Ids

Message = dict[str, Any]
"""`role` and `content`; `train: False` on an assistant's message that is context."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
CHUNK_ROWS = 32768
CHUNK_CHARS = 64 * 2**20


def canonical(turns: Sequence[Turn]) -> str:
    """Return the canonical JSON of a chat: `[["user","…"],["assistant","…"]]`, non-ASCII kept, no white space."""
    return "[" + ",".join([f'["{role}",{encode_basestring(content)}]' for role, content in turns]) + "]"


def content_digest(turns: Sequence[Turn]) -> bytes:
    """Return the 16 bytes whose hex is the row's id (the first half of sha256 over the canonical JSON)."""
    return hashlib.sha256(canonical(turns).encode()).digest()[:16]


def pair_digest(prompt: Sequence[Turn], chosen: Sequence[Turn], rejected: Sequence[Turn] | None) -> bytes:
    """Return the 16 bytes whose hex is a pair's id; `rejected` may be absent (JSON null)."""
    other = "null" if rejected is None else canonical(rejected)
    return hashlib.sha256(f"[{canonical(prompt)},{canonical(chosen)},{other}]".encode()).digest()[:16]


def marked(chat: list[Message] | None) -> Any:
    """Return a stored chat as messages: the role of an answer that is context becomes `train: False`."""
    for message in chat or ():
        if message["role"] == CONTEXT:
            message |= {"role": "assistant", "train": False}
    return chat


def chats(column: pa.ListArray) -> list[Any]:
    """Return a column of chats (n,) as n lists of messages, or None where it is null."""
    chats: list[Any] = column.to_pylist()
    if pc.any(pc.equal(column.flatten().field("role"), CONTEXT)).as_py():
        chats = [marked(chat) for chat in chats]
    return chats


class ChatColumn:
    """A column of message lists, kept flat until it is finished."""

    def __init__(self) -> None:
        """Start empty."""
        self.roles: list[str] = []
        self.contents: list[str] = []
        self.offsets: list[int | None] = []
        self.chars = 0

    def append(self, turns: Sequence[Turn] | None) -> None:
        """Add one row's chat, or null."""
        if turns is None:
            self.offsets.append(None)
            return
        self.offsets.append(len(self.roles))
        for role, content in turns:
            self.roles.append(role)
            self.contents.append(content)
            self.chars += len(content)

    def finish(self) -> pa.Array:
        """Return the Arrow array and start anew."""
        self.offsets.append(len(self.roles))
        struct = pa.StructArray.from_arrays(
            [pa.array(self.roles, pa.string()), pa.array(self.contents, pa.large_string())], ["role", "content"]
        )
        array = pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), struct)
        self.__init__()  # type: ignore[misc]
        return array.cast(MESSAGES)


def unique_ids(digests: bytes) -> tuple[pa.Array, int]:
    """Turn 16-byte digests into hex ids; the 2nd, 3rd … copy of one gets -1, -2 … appended.

    Returns the ids (n,) as strings, and how many rows are copies of an earlier one.
    """
    ids, duplicates = Ids.numbered(digests)
    return ids.arrow(), duplicates
