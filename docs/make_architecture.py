"""Draw docs/img/architecture.svg, the rooms and who imports whom, from the source: `python docs/make_architecture.py`.

`tests/test_house.py` holds the rules of the house by the same reading of the imports, and that the picture is current.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src/keepset"
PICTURE = Path(__file__).parent / "img/architecture.svg"

ROOMS = [
    "cli", "deliver", "report", "judging", "pipeline", "selection", "methods", "stages", "train", "evaluate",
    "features", "model", "data", "runfolder", "root",
]  # fmt: skip
"""Top to bottom: a file imports from its own room and those below, also inside functions."""

LABEL, STEP, TOP = 150, 34, 14  # pixels: the first room's label, from room to room, the margin above
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .name { font-weight: 600 } .size { fill: #57606a }
.line { stroke: #afb8c1; fill: none } .head, .room { fill: #0b7a75 } .import { fill: #ffffff; stroke: #57606a }
.number { font-size: 9px; text-anchor: middle } .right { text-anchor: end }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .size { fill: #9198a1 } .line { stroke: #565e68 } .head, .room { fill: #4fc1b8 }
  .import { fill: #161b22; stroke: #9198a1 }
}"""


def modules() -> dict[str, Path]:
    """The package's modules by their dotted names."""
    paths = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        paths[".".join(("keepset", *parts)).removesuffix(".__init__")] = path
    return paths


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "root"


def imported(path: Path, paths: dict[str, Path]) -> set[str]:
    """Modules of keepset that a file imports, also inside functions; those for types only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for_types |= {inner for line in node.body for inner in ast.walk(line)}
    names = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keepset":
            names |= {full if (full := f"{node.module}.{a.name}") in paths else str(node.module) for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] == "keepset"}
    return names


def arrows() -> Counter[tuple[str, str]]:
    """(importing room, imported room below it) -> how many modules of the one import from the other."""
    paths, counts = modules(), Counter[tuple[str, str]]()
    for module, path in paths.items():
        own = room(module)
        counts.update((own, other) for other in {room(name) for name in imported(path, paths)})
    return Counter({pair: n for pair, n in counts.items() if ROOMS.index(pair[0]) < ROOMS.index(pair[1])})


def picture() -> str:
    """The SVG: rooms on a diagonal; from each a line to the right, and down from a number to each room it imports."""
    sizes: dict[str, list[int]] = {name: [] for name in ROOMS}
    for module, path in modules().items():
        sizes[room(module)].append(len(path.read_text(encoding="utf-8").splitlines()))
    across = {name: LABEL + STEP * i for i, name in enumerate(ROOMS)}
    down = {name: TOP + STEP // 2 + STEP * i for i, name in enumerate(ROOMS)}
    lines, dots, labels = [], [], []
    counts = arrows()
    for name in ROOMS:
        x, y = across[name], down[name]
        used = [other for other in ROOMS if (name, other) in counts]
        users = [other for other in ROOMS if (other, name) in counts]
        if used:
            lines.append(f'<path class="line" d="M{x} {y}H{across[used[-1]]}"/>')
        if users:
            lines.append(f'<path class="line" d="M{x} {down[users[0]]}V{y - 12}"/>')
            lines.append(f'<path class="head" d="M{x} {y - 7}l-4 -7h8z"/>')
        for other in used:
            dots.append(f'<circle class="import" cx="{across[other]}" cy="{y}" r="8"/>')
            dots.append(
                f'<text class="number" x="{across[other]}" y="{y + 3}"><title>{counts[name, other]} modules of {name} '
                f"import from {other}</title>{counts[name, other]}</text>"
            )
        labels.append(f'<rect class="room" x="{x - 7}" y="{y - 7}" width="14" height="14" rx="3"/>')
        labels.append(
            f'<text class="right" x="{x - 13}" y="{y + 4}"><tspan class="name">{name}</tspan> '
            f'<tspan class="size">{len(sizes[name])} files, {sum(sizes[name]):,} lines</tspan></text>'
        )
    width, height = across[ROOMS[-1]] + 16, down[ROOMS[-1]] + 20
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<title>The rooms of keepset, and how many modules of each import from which room below</title>",
        f"<style>{STYLE}\n</style>", *lines, *dots, *labels, "</svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
