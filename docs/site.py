"""mkdocs hook: pages from the top of the repository join the site; links to what is not in it become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = ("SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./|docs/)?([^)#:]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the top pages."""
    for name in TOP:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the site's own pages; what the site has no page for stays as its text."""
    known = {file.src_uri for file in files}

    def mend(found: re.Match[str]) -> str:
        text, _, path, anchor = found.groups()
        if path in known:
            return f"[{text}]({path}{anchor or ''})"
        if not (ROOT / "docs" / path).exists() and not (ROOT / path).exists():
            return found[0]  # a link that leads nowhere: the strict build says so
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(mend, markdown)
