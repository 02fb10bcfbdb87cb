"""mkdocs hook: pages from the top of the repository join the site, and one for each file of methods, made from it.

Links to what is not in the site become text.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from keepset.methods.method import Method
from keepset.methods.table import METHODS

ROOT = Path(__file__).parents[1]
TOP = ("SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./|docs/)?([^)#:]+)(#[^)]*)?\)")


BANK = ROOT / "experiments/validate/results/bank.json"
"""What each method's scores said of trainings on random halves of 200 rows; see experiments/validate."""
COSTS = {
    "free": "nothing", "text": "a pass over the texts", "forward": "one or two forward passes of the pool",
    "reference": "a training on the pool and two forward passes",
    "gradients": "a warm-up and one backward pass a checkpoint", "retraining": "the model is trained many times",
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the top pages and the methods'."""
    for name in TOP:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, text in method_pages().items():
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    return files


def method_pages() -> dict[str, str]:
    """A page for each file of methods: what it says at its top, and of each method when to take it, options, LDS."""
    pages: dict[str, list[type[Method]]] = {}
    for method in METHODS.values():
        pages.setdefault(method.__module__.rpartition(".")[2].strip("_"), []).append(method)
    return {name: method_page(methods) for name, methods in pages.items()}


def method_page(methods: list[type[Method]]) -> str:
    """The page of the methods of one file."""
    top, _, text = inspect.cleandoc(sys.modules[methods[0].__module__].__doc__ or "").partition("\n\n")
    parts = [f"# {', '.join(m.name for m in methods)}", top, text]
    for method in methods:
        rows = [f"| `{name}` | {describe(kind)} | `{value}` |" for name, (kind, value) in method.options().items()]
        parts += [
            f"## {method.name}", f"Take it {method.when}.",
            f"Score: {method.formula}. Source: {method.paper}.",
            f"It needs {', '.join(method.needs)}, and costs {COSTS[method.cost]}.",
            "\n".join(["| option | values | default |", "|---|---|---|", *rows]) if rows else "",
            measured(method.name),
        ]  # fmt: skip
    parts.append("[All methods](../methods.md), [what these figures mean](../truth.md).")
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(kind: Any) -> str:
    """The values that an option takes."""
    return ", ".join(f"`{value}`" for value in getattr(kind, "__args__", ())) or kind.__name__


def measured(name: str) -> str:
    """Its LDS in the bank of experiments/validate, as a table; "" where it has none."""
    (design,) = (d for d in json.loads(BANK.read_text(encoding="utf-8"))["designs"] if d["name"] == "halves")
    own = {s["outcome"]: s["lds"] for s in design["scores"] if s["label"] == name and s["lds"]}
    if not own:
        return ""
    lines = [
        f"| {outcome['name']} | {own[outcome['name']]['value']:+.2f} | {own[outcome['name']]['low']:+.2f} to "
        f"{own[outcome['name']]['high']:+.2f} | {outcome['ceiling']:.2f} |"
        for outcome in design["outcomes"] if outcome["name"] in own
    ]  # fmt: skip
    head = f"LDS over {design['models']} trainings on random halves (experiments/validate):"
    return "\n".join([head, "", "| outcome | LDS | 95 % interval | ceiling |", "|---|---|---|---|", *lines])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the site's own pages; what the site has no page for stays as its text."""
    known = {file.src_uri for file in files}
    if page.file.src_uri == "methods.md":  # the files of the table lead to their pages
        markdown = re.sub(r"\| `((\w+?)_?\.py)` \|$", r"| [`\1`](methods/\2.md) |", markdown, flags=re.M)

    def mend(found: re.Match[str]) -> str:
        text, _, path, anchor = found.groups()
        if path in known:
            return f"[{text}]({path}{anchor or ''})"
        if not (ROOT / "docs" / path).exists() and not (ROOT / path).exists():
            return found[0]  # a link that leads nowhere: the strict build says so
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(mend, markdown)
