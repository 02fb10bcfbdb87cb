"""Print the tables of README.md from `results/scale.json` and others' results, and draw the picture.

`python experiments/scale/table.py` prints; `--write` also puts them into README.md and draws docs/img/scale.png.
Seconds are the processor's. What a process takes with 10 rows is `start`; every other share is what its entries in
`costs.jsonl` take above that. Reading is all that is in no entry: reading and checking the file, ids, writing the
scores. Of that, encoding is what a run of `encoding` takes more than one of `random`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REAL = ROOT / "experiments" / "methods-table" / "results" / "table.json"
START = "10"
SHARES = ("start", "reading", "encoding", "training", "passes", "formula")
Run = dict[str, Any]


def entries(run: Run, *begins: str) -> float:
    """Seconds of the entries whose stage begins so."""
    return sum(e["cpu_seconds"] for e in run["stages"] if e["stage"].startswith(begins))


def parts(run: Run) -> dict[str, float]:
    """A run's seconds: outside its entries, in trainings, in passes of a model, in what is left of scoring."""
    whole, train = entries(run, "score "), entries(run, "train ")
    passes = entries(run, "losses ", "gradients at ", "representations ", "target ")
    return {
        "reading": run["cpu_seconds"] - whole,
        "training": train,
        "passes": passes,
        "formula": whole - train - passes,
    }


def shares(runs: dict[str, dict[str, Run]], method: str, n: str) -> dict[str, float]:
    """Seconds by share; they add up to the run's."""
    small, large = parts(runs[method][START]), parts(runs[method][n])
    out = {name: large[name] - small[name] for name in large}
    out["start"], out["encoding"] = runs[method][START]["cpu_seconds"], 0.0
    if "encoding" in runs and n in runs["encoding"] and method not in ("random", "bm25", "dsir"):
        read = [parts(runs["random"][k])["reading"] for k in (START, n)]
        encode = [parts(runs["encoding"][k])["reading"] for k in (START, n)]
        out["encoding"] = encode[1] - encode[0] - (read[1] - read[0])
        out["reading"] -= out["encoding"]
    return out


def above(costs: dict[str, Run], n: str, what: str = "cpu_seconds") -> float:
    """What a size takes more than the start."""
    return float(costs[n][what] - costs[START][what])


def sizes_of(costs: dict[str, Run]) -> list[str]:
    """The measured sizes, the start left out."""
    return sorted((n for n in costs if n != START), key=int)


def print_costs(runs: dict[str, dict[str, Run]]) -> None:
    """Processor and wall seconds, memory, and how they grow."""
    sizes = sorted({n for costs in runs.values() for n in sizes_of(costs)}, key=int)
    titles = [f"{int(n):,} rows" for n in sizes]
    print("| | start | " + " | ".join(titles) + " | exponents | ms a row | KiB a row |")
    print("|---" * (len(sizes) + 5) + "|")
    for method, costs in runs.items():
        mine = sizes_of(costs)
        cells = [f"{costs[START]['cpu_seconds']:.1f}, {costs[START]['peak_mib']}"]
        for n in sizes:
            one = costs.get(n)
            cells.append(f"{one['cpu_seconds']:,.0f} ({one['seconds']:,.0f}), {one['peak_mib']:,}" if one else "–")
        pairs = list(zip(mine, mine[1:], strict=False))
        growth = [math.log(above(costs, b) / above(costs, a)) / math.log(int(b) / int(a)) for a, b in pairs]
        last, top = pairs[-1] if pairs else (mine[-1], mine[-1])
        more = max(1, int(top) - int(last))
        cells.append(", ".join(f"{g:.2f}" for g in growth) or "–")
        seconds, mib = (above(costs, top, what) - above(costs, last, what) for what in ("cpu_seconds", "peak_mib"))
        cells.append(f"{1000 * seconds / more:.2g}" if pairs else "–")
        cells.append(f"{1024 * mib / more:.1f}" if pairs else "–")
        print(f"| `{method}` | " + " | ".join(cells) + " |")


def print_shares(runs: dict[str, dict[str, Run]]) -> None:
    """What the seconds go to."""
    print("| | rows | " + " | ".join(SHARES) + " | most |")
    print("|---" * (len(SHARES) + 3) + "|")
    for method, costs in runs.items():
        if method == "select":
            continue
        for n in sizes_of(costs):
            of = shares(runs, method, n)
            total, most = costs[n]["cpu_seconds"], max(of, key=lambda name: of[name])
            cells = [f"{max(0.0, of[name]) / total:.0%}" for name in SHARES]
            print(f"| `{method}` | {int(n):,} | " + " | ".join(cells) + f" | {most} |")


def print_large(memory: list[Run]) -> None:
    """The text methods and encoding beyond: synthetic rows of 60 words."""
    methods = list(dict.fromkeys(run["method"] for run in memory))
    print("| rows | " + " | ".join(f"`{m}`" for m in methods) + " |")
    print("|---" * (len(methods) + 1) + "|")
    for n in sorted({run["rows"] for run in memory}):
        one = {run["method"]: run for run in memory if run["rows"] == n}
        cells = [f"{one[m]['cpu_seconds']:,.0f} s, {one[m]['peak_mib']:,} MiB" if m in one else "–" for m in methods]
        print(f"| {n:,} | " + " | ".join(cells) + " |")


def print_real(real: dict[str, Any], sizes: list[str]) -> None:
    """SmolLM2-135M on the 1,000 rows of experiments/methods-table; the larger sizes are extrapolated by the row."""
    rows = real["rows"]
    print(f"| SmolLM2-135M | measured, {rows:,} rows | a row | " + " | ".join(f"{int(n):,} rows" for n in sizes) + " |")
    print("|---" * (len(sizes) + 3) + "|")
    for method in ("rds", "davir", "less", "rose"):
        seconds = real["methods"][method]["cpu_seconds"]
        hours = [f"{seconds / rows * int(n) / 3600:,.0f} h" for n in sizes]
        print(f"| `{method}` | {seconds:,.0f} s | {seconds / rows:.2f} s | " + " | ".join(hours) + " |")
    print(f"\n{real['tokens'] / rows:.0f} tokens a row.")


def plot(runs: dict[str, dict[str, Run]], memory: list[Run], out: Path) -> None:
    """Processor seconds and memory against rows, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colours = {name: f"C{k}" for k, name in enumerate(runs)}
    for axes, what, title in ((left, "cpu_seconds", "processor seconds"), (right, "peak_mib", "peak memory, MiB")):
        for method, costs in runs.items():
            sizes = sizes_of(costs)
            values = [costs[n][what] for n in sizes]
            axes.plot([int(n) for n in sizes], values, marker="o", ms=3, lw=1.2, color=colours[method], label=method)
        for method in dict.fromkeys(run["method"] for run in memory):
            mine = sorted((run["rows"], run[what]) for run in memory if run["method"] == method)
            axes.plot(*zip(*mine, strict=True), marker="x", ms=3, lw=0.8, ls="--", color=colours[method])
        axes.set(xscale="log", yscale="log", xlabel="rows", title=title)
        axes.grid(alpha=0.3, which="both", lw=0.4)
    right.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=110)


def print_predicted(rows: list[dict[str, Any]]) -> None:
    """What `predict.py` found."""
    print("| | rates of | rows | reading and encoding | training | passes | all three |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = ["–" if v is None else f"{v:.2f}" for v in row["ratio"].values()]
        print(f"| `{row['method']}` | {row['from']:,} | {row['to']:,} | " + " | ".join(cells) + " |")


def printed(show: Callable[..., None], *facts: Any) -> str:
    """What a function prints."""
    with redirect_stdout(StringIO()) as text:
        show(*facts)
    return text.getvalue().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md, draw docs/img/scale.png")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scale.json")
    args = parser.parse_args()
    runs = json.loads(args.results.read_text())["runs"]
    memory = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["runs"]
    tables = {
        "costs": printed(print_costs, runs),
        "shares": printed(print_shares, runs),
        "large": printed(print_large, memory),
        "real": printed(print_real, json.loads(REAL.read_text()), sizes_of(runs["random"])),
        "predicted": printed(print_predicted, json.loads((HERE / "results" / "predicted.json").read_text())),
    }
    print(*tables.values(), sep="\n\n")
    if args.write:
        page = (HERE / "README.md").read_text(encoding="utf-8")
        for name, table in tables.items():
            page = re.sub(
                rf"<!-- {name} -->\n.*?<!-- end -->", f"<!-- {name} -->\n{table}\n<!-- end -->", page, flags=re.S
            )
        (HERE / "README.md").write_text(page, encoding="utf-8")
        plot(runs, memory, ROOT / "docs" / "img" / "scale.png")


if __name__ == "__main__":
    main()
