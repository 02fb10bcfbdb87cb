"""Growing Arrow columns: rows are appended to plain lists and turned into a table chunk by chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keepset.data.turns import CONTEXT, Turn

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
    n = len(digests) // 16
    keys = np.frombuffer(digests, dtype=">u8").reshape(n, 2)
    order = np.lexsort((np.arange(n), keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    same = np.zeros(n, dtype=bool)
    same[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    offsets = pa.py_buffer((np.arange(n + 1, dtype=np.int64) * 32).tobytes())
    text = pa.py_buffer(digests.hex().encode("ascii"))
    ids = pa.LargeStringArray.from_buffers(n, offsets, text)
    if not same.any():
        return _as_string(ids), 0
    values = ids.to_pylist()
    copy = 0
    for at, is_copy in zip(order.tolist(), same.tolist(), strict=True):
        copy = copy + 1 if is_copy else 0
        if copy:
            values[at] = f"{values[at]}-{copy}"
    return pa.chunked_array([pa.array(values, pa.string())]), int(same.sum())


def _as_string(ids: pa.LargeStringArray) -> pa.ChunkedArray:
    step = 2**24  # a `string` chunk holds at most 2 GiB
    parts = [ids.slice(k, step).cast(pa.string()) for k in range(0, max(len(ids), 1), step)]
    return pa.chunked_array(parts, pa.string())
