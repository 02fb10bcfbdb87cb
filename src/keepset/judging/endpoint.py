"""One request to an OpenAI-compatible `/chat/completions`, made again after failures and rate limits.

Why not the `openai` client (3.57, tried on a local server): its timeout is that of one read, so it never gives up a
reply that comes a byte at a time; it reads a reply of any size (9.6 GiB of memory for one of 3.1 GiB); it follows a 307
to another host with the prompt; it neither asks again after a reply that is no JSON nor counts the requests it made.
What it would save are the loop and the waits of `ask`.
"""

from __future__ import annotations

import json
import os
import random
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from keepset.errors import KeepsetError

LARGEST_REPLY = 1 << 24
"""Bytes of a reply that are read at most."""

REFUSALS = (400, 401, 403, 404, 405, 413, 422)
"""What a server says of a request that would fail again: the key, the model or the request itself is wrong."""

DETAIL = 200
"""Bytes of a server's explanation that an error repeats."""


@dataclass(frozen=True)
class Reply:
    """A model's text and what it cost.

    Attributes:
        text: as the model wrote it.
        requests: made for it; 0 if it comes from a cache.
        prompt_tokens: as the endpoint counts them.
        completion_tokens: likewise.
    """

    text: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers, and how long and how often it is asked.

    The API key is read from the environment variable named `key_variable` and is never written anywhere. Redirects are
    refused: the key and the prompts go to this address and to no other.

    Attributes:
        url: base address, for example `https://host/v1`.
        model: its name there.
        key_variable: environment variable that holds the API key.
        timeout: seconds a request may take, and how long the endpoint may be silent.
        tries: requests made before giving up.
        max_tokens: longest reply.
        pause: first wait after a failure, in seconds; it doubles, with jitter, up to `longest_pause`.
        longest_pause: longest wait, also where the endpoint asks for more.
        sleep: waits that many seconds.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 5
    max_tokens: int = 512
    pause: float = 1.0
    longest_pause: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    @property
    def address(self) -> str:
        """Where requests go.

        Raises:
            KeepsetError: not http or https.
        """
        if not self.url.startswith(("http://", "https://")):
            raise KeepsetError(f"judge {self.url}: not an http(s) address")
        return self.url.rstrip("/") + "/chat/completions"

    def ask(self, prompt: str, temperature: float) -> Reply:
        """One reply.

        Raises:
            KeepsetError: the endpoint refuses or sends elsewhere, or failed `tries` times.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self.max_tokens,
                "temperature": temperature}  # fmt: skip
        trouble = "no answer"
        for made in range(1, self.tries + 1):
            wait = min(self.longest_pause, self.pause * 2 ** (made - 1)) * (0.5 + random.random())  # jitter
            try:
                status, headers, data = self._post(json.dumps(body).encode())
                if 200 <= status < 300:
                    return _reply(data, made)
                trouble = f"HTTP {status}"
                wait = min(self.longest_pause, max(wait, _seconds(headers.get("Retry-After"))))
            except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if made < self.tries:
                self.sleep(wait)
        raise KeepsetError(f"judge {self.address}: gave up after {self.tries} tries, the last: {trouble}")

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one request's answer.

        Raises:
            KeepsetError: a refusal or a redirect.
            OSError, HTTPException, ValueError: no answer by the deadline, too large a one, or one that isn't HTTP.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        request = urllib.request.Request(self.address, body, headers)
        deadline = time.monotonic() + self.timeout
        with _opener().open(request, timeout=self.timeout) as response:
            if 300 <= response.status < 400:
                elsewhere = response.headers.get("Location", "elsewhere")[:DETAIL]
                raise KeepsetError(f"judge {self.address}: redirects ({response.status}) to {elsewhere}; name the "
                                   "address that answers")  # fmt: skip
            data = _read(response, deadline)
        if response.status in REFUSALS:
            detail = data[:DETAIL].decode("utf-8", "replace").replace("\n", " ")
            raise KeepsetError(f"judge {self.address}: refused ({response.status}): {detail}")
        return response.status, response.headers, data


def _opener() -> urllib.request.OpenerDirector:
    """urllib's opener less its redirects, which would take the key along, and less errors made of statuses."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        opener.add_handler(handler())
    return opener


def _read(response: Any, deadline: float) -> bytes:
    """Read a reply of bounded size by a deadline, also from an endpoint that sends a byte now and then.

    Raises:
        TimeoutError, ValueError: it is late, or too large.
    """
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise ValueError(f"a reply of more than {LARGEST_REPLY >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return b"".join(parts)


def _reply(data: bytes, requests: int) -> Reply:
    """The text and usage of a chat completion.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: it isn't one.
    """
    completion = json.loads(data)
    text = completion["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("content is no text")
    usage = completion.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(text, requests, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int:
    """A token count as the endpoint gives it; endpoints lie, so anything odd is 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _seconds(value: str | None) -> float:
    """A Retry-After header in seconds; a date or nothing is 0."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0
