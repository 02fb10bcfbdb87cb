"""Payload to HTML: one file, no outside request, and nothing in it that a row's text could turn into code.

Three walls: the data stands in a non-executable `application/json` block with `<`, `>` and `&` escaped; the page's code
puts text in by `textContent` only, which the policy's Trusted Types enforce; and the Content-Security-Policy allows the
one script and the one style by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("dom.js", "charts.js", "first.js", "overview.js", "rows.js", "start.js")
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def inline_json(value: Any) -> str:
    """JSON that can stand inside a `<script>` block: no `<`, `>`, `&`, line separators or lone surrogates in it.

    Raises:
        ValueError: NaN or an infinity, which JSON has no word for.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csp_hash(text: str) -> str:
    """The hash source of an inline script or style, as Content-Security-Policy writes it."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"


def asset(name: str) -> str:
    """A file of this package as text."""
    return (files("keepset.report") / name).read_text(encoding="utf-8")


def render(payload: dict[str, Any]) -> str:
    """Return the whole page."""
    script = '"use strict";\n(() => {\n' + "\n".join(asset(name) for name in SCRIPTS) + "\n})();\n"
    style = asset("style.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {csp_hash(script)}",
            f"style-src {csp_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    return Template(asset("page.html")).substitute(policy=policy, style=style, script=script, data=inline_json(payload))
