"""Run docs/tour_cells.py as a notebook on the demo model: `make tour` writes docs/tour.ipynb and docs/tour.md.

`--site` only writes tour.md again from the notebook, without running anything. Outputs are kept small: text is cut to
40 lines, a figure is one PNG, and nothing names a folder of the machine it ran on.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LINES = 40


def cells() -> list[tuple[str, str]]:
    """The source as (kind, text), kind is `markdown` or `code`."""
    parts = re.split(r"^# %%(.*)\n", (HERE / "tour_cells.py").read_text(encoding="utf-8"), flags=re.M)[1:]
    found = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        if "markdown" in mark:
            found.append(("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.M)))
        else:
            found.append(("code", text.strip()))
    return found


def run() -> dict[str, Any]:
    """Run the cells in a new folder; returns the notebook with its outputs, free of times and machine names."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook()
    book.cells = [getattr(nbformat.v4, f"new_{kind}_cell")(text) for kind, text in cells()]
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in (small(output) for output in cell.outputs) if o is not None]
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.loads(nbformat.writes(book))


def small(output: Any) -> Any:
    """An output without warnings, long texts and paths of this machine; None if nothing is left."""
    if output.output_type == "stream" and output.name == "stderr":
        return None
    if output.output_type == "stream":
        output.text = clean(output.text)
    elif "data" in output:
        keep = {k: v for k, v in output.data.items() if k in ("text/plain", "image/png")}
        if "image/png" in keep:
            keep.pop("text/plain", None)
        output.data = {k: clean(v) if k == "text/plain" else v for k, v in keep.items()}
        output.metadata = {}
    return output


def clean(text: str) -> str:
    """At most LINES lines; the home and package folders cut from paths."""
    for place in (str(HERE.parent), os.path.expanduser("~"), sys.prefix):
        text = text.replace(place, "…")
    some = text.rstrip().split("\n")
    return "\n".join(some[:LINES] + (["…"] if len(some) > LINES else [])) + "\n"


def page(book: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its figures by file name."""
    parts, figures = [], {}
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tour-{len(figures) + 1}.png"
                figures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![figure](img/{name}){{ width=420 }}")
            else:
                parts.append("```text\n" + "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n```")
    note = "The same as a notebook: `docs/tour.ipynb`. Made by `make tour`."
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n", figures


def main() -> None:
    """Run it, or only write the page again."""
    notebook = HERE / "tour.ipynb"
    if "--site" not in sys.argv:
        notebook.write_text(json.dumps(run(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text, figures = page(json.loads(notebook.read_text(encoding="utf-8")))
    (HERE / "tour.md").write_text(text, encoding="utf-8")
    for name, data in figures.items():
        (HERE / "img" / name).write_bytes(data)


if __name__ == "__main__":
    main()
