"""`keepset plot`: a run's figures for papers, as PNG, SVG or PDF. Reads the run folder only; needs matplotlib.

Single-column width, 8 point type, colours that survive grey print and colour blindness; text stays text in SVG and PDF.
The same run gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keepset.errors import KeepsetError, RecipeError, did_you_mean
from keepset.pipeline.metrics import headlines, is_loss
from keepset.report.numbers import cut_of, histogram, length_correlation, overlap
from keepset.report.payload import CONTROLS
from keepset.report.read import RunData, read_run
from keepset.runfolder import layout
from keepset.runfolder.records import Entry

FORMATS = ("png", "svg", "pdf")
KEPT, REST, INK = "#0b7a6f", "#a7a49c", "#26231d"
KINDS = ("scores", "length", "losses", "comparison", "curve", "overlap")
SIZED = ("method", "random", "longest", "shortest")  # what is trained at each budget
DOTS = 20_000  # most dots of a scatter plot
STYLE: Any = {
    "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "keepset", "pdf.fonttype": 42, "figure.constrained_layout.use": True,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.parse_math": False,
}  # fmt: skip


def leading(data: RunData) -> list[str]:
    """The metrics that the comparison leads with, its headline first."""
    return [metric.name for metric in headlines((), data.comparison.headline if data.comparison else "")]


def write_plots(
    run_dir: Path,
    out: Path | None = None,
    *,
    formats: Sequence[str] = ("png", "svg"),
    only: Sequence[str] = (),
    metrics: Sequence[str] = (),
    width: float = 3.3,
) -> list[Path]:
    """Draw what the run folder has figures for.

    Formats are png, svg, pdf; `only` are some of `KINDS`, by default all that the run has data for; `metrics` by
    default those that the comparison leads with (else the first four). Files go to `out`, by default `run_dir/plots`;
    `width` is in inches.

    Returns:
        The files: `scores-<label>` (histogram with the cut), `length-<label>` (score against length), `losses-<label>`
        (base against reference), `comparison-<metric>` (intervals against Random), `curve-<metric>` (quality against
        budget, where there are several), `overlap` (Jaccard and rank correlation).

    Raises:
        RecipeError: an unknown format or kind.
        KeepsetError: matplotlib is missing, the folder has no scores, or nothing of `only` is there.
    """
    for what, given, choices in (("format", formats, FORMATS), ("plot", only, KINDS)):
        for name in given:
            if name not in choices:
                hint = did_you_mean(name, list(choices)) or f"; there are: {', '.join(choices)}"
                raise RecipeError(f"no {what} '{name}'{hint}")
    try:
        import matplotlib
    except ImportError:
        raise KeepsetError("plots need matplotlib: pip install 'keepset[plots]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = read_run(Path(run_dir), texts=False)
    folder = Path(out) if out is not None else Path(run_dir) / layout.PLOTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, shape, draw in drawings(data, metrics):
            if only and name.split("-")[0] not in only:
                continue
            figure = Figure(figsize=(width, width * shape))
            FigureCanvasAgg(figure)
            draw(figure.add_subplot())
            written += [save(figure, folder / f"{name}.{kind}") for kind in formats]
    if not written:
        raise KeepsetError(f"{run_dir}: nothing to draw for {', '.join(only)}; a comparison comes with `keepset run`")
    return written


def save(figure: Any, path: Path) -> Path:
    """Write one file whole or not at all, without a date in it."""
    part = path.with_name(path.name + ".part")
    kind = path.suffix[1:]
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.get(kind, {"CreationDate": None})
    try:
        figure.savefig(part, format=kind, dpi=300, metadata=metadata)
        os.replace(part, path)
    except OSError as error:
        raise KeepsetError(f"{path}: can't be written: {error.strerror or error}") from None
    return path


def drawings(data: RunData, asked: Sequence[str]) -> Iterator[tuple[str, float, Callable[[Any], None]]]:
    """What there is to draw: file name, height over width, and the function that draws into axes."""
    for label, columns in data.columns.items():
        if data.method_names.get(label, label) in CONTROLS:
            continue
        if histogram(columns["score"], columns["selected"]):
            yield f"scores-{label}", 0.62, partial(draw_scores, columns)
        if length_correlation(columns["score"], data.n_tokens):
            yield f"length-{label}", 0.72, partial(draw_length, columns, data)
        if {"loss_ini", "loss_ref"} <= set(columns):
            yield f"losses-{label}", 0.85, partial(draw_losses, columns, data)
    summary = data.comparison.summary if data.comparison else ()
    measured = list(dict.fromkeys(name for entry in summary for name in entry.metrics))
    metrics = [m for m in asked or leading(data) if m in measured] or measured[:4]
    budgets = list(dict.fromkeys(e.budget for e in summary if e.kind in SIZED))
    for metric in metrics:
        first = [e for e in summary if metric in e.metrics and e.budget in (budgets[0] if budgets else None, None)]
        yield f"comparison-{metric}", 0.16 + 0.085 * len(first), partial(draw_comparison, first, metric)
        if len(budgets) > 1:
            yield f"curve-{metric}", 0.68, partial(draw_curve, summary, metric)
    both = overlap(data.columns)
    if both:
        yield "overlap", 0.9, partial(draw_overlap, both)


def draw_scores(columns: dict[str, np.ndarray], ax: Any) -> None:
    """Histogram of the scores, kept rows in colour, the cut as a line."""
    bars = histogram(columns["score"], columns["selected"])
    assert bars is not None
    edges = np.array(bars["edges"])
    ax.bar(edges[:-1], bars["all"], np.diff(edges), align="edge", color=REST, label="not kept")
    ax.bar(edges[:-1], bars["kept"], np.diff(edges), align="edge", color=KEPT, label="kept")
    cut = cut_of(columns["score"], columns["selected"])
    if cut is not None:
        ax.axvline(cut, color=INK, lw=0.8, ls=(0, (3, 2)))
        ax.annotate(f"cut {cut:.3g}", (cut, 1), xycoords=("data", "axes fraction"), xytext=(3, -8),
                    textcoords="offset points", fontsize=7)  # fmt: skip
    ax.set(xlabel="score", ylabel="rows")
    ax.legend()


def scatter(ax: Any, x: np.ndarray, y: np.ndarray, selected: np.ndarray) -> None:
    """Dots, kept ones on top; of very many a fair draw (rows stand in the order of their ids, which are hashes)."""
    both = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    for mask, colour, label in ((selected[both] <= 0, REST, "not kept"), (selected[both] > 0, KEPT, "kept")):
        dots = both[mask]
        dots = dots[:: max(1, len(dots) // DOTS)]
        size = 9 if len(dots) < 400 else 2.5
        ax.scatter(x[dots], y[dots], s=size, color=colour, lw=0, alpha=0.7, label=label, rasterized=len(dots) > 3000)
    ax.legend()


def draw_length(columns: dict[str, np.ndarray], data: RunData, ax: Any) -> None:
    """Score against length, with the rank correlation."""
    scatter(ax, data.n_tokens, columns["score"], columns["selected"])
    link = length_correlation(columns["score"], data.n_tokens) or {}
    if link.get("spearman") is not None:
        ax.set_title(f"Spearman {link['spearman']:+.2f}", fontsize=8, loc="left")
    ax.set(xlabel=f"supervised {data.length_unit}", ylabel="score")


def draw_losses(columns: dict[str, np.ndarray], data: RunData, ax: Any) -> None:
    """Base against reference loss a token; what lies below the diagonal was learnt."""
    length = np.maximum(data.n_tokens, 1)
    x, y = columns["loss_ini"] / length, columns["loss_ref"] / length
    scatter(ax, x, y, columns["selected"])
    most = float(np.nanmax([np.nanmax(x), np.nanmax(y)]))
    ax.plot([0, most], [0, most], color=INK, lw=0.6, ls=(0, (1, 2)))
    ax.set(xlabel="base loss, nats a token", ylabel="reference loss")


def draw_comparison(entries: Sequence[Entry], metric: str, ax: Any) -> None:
    """One line a subset with its 95 % interval; Random as a dashed line; a star where it differs from Random."""
    sign = -1 if is_loss(metric) else 1
    entries = sorted(entries, key=lambda e: (e.kind == "method", sign * e.metrics[metric].value))
    for place, entry in enumerate(entries):
        mean, versus = entry.metrics[metric], entry.vs_random.get(metric)
        colour = KEPT if entry.kind == "method" else REST
        ax.plot([mean.low, mean.high], [place, place], color=colour, lw=1.4, solid_capstyle="round")
        ax.plot(mean.value, place, "o", color=colour, ms=4)
        if versus is not None and (versus.p if versus.p_holm is None else versus.p_holm) < 0.05:
            ax.annotate("*", (mean.value, place), xytext=(0, 2), textcoords="offset points", ha="center")
    random = [e.metrics[metric].value for e in entries if e.kind == "random"]
    if random:
        ax.axvline(float(np.mean(random)), color=INK, lw=0.6, ls=(0, (3, 2)), zorder=0)
    ax.set_yticks(range(len(entries)), [e.label.split("@")[0] for e in entries])
    ax.set(xlabel=named(metric), ylim=(-0.6, len(entries) - 0.4))
    ax.tick_params(axis="y", length=0)


def draw_curve(entries: Sequence[Entry], metric: str, ax: Any) -> None:
    """Quality against the rows trained on, one line a method; base and full pool stand apart and are left out."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for e in entries:
        if metric in e.metrics and e.kind in SIZED and e.n_rows:
            mean = e.metrics[metric]
            lines.setdefault(e.label.split("@")[0], []).append((e.n_rows, mean.value, mean.low, mean.high))
    dashes = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1))]
    for k, (label, points) in enumerate(lines.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        colour = REST if label in ("random", "longest", "shortest") else KEPT
        ax.plot(x, y, color=colour, ls=dashes[k % 4], lw=1.2, marker="o", ms=3, label=label)
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    ax.set(xlabel="rows trained on", ylabel=named(metric))
    ax.legend()


def draw_overlap(agreement: dict[str, Any], ax: Any) -> None:
    """Below the diagonal the Jaccard of the kept rows, above it the rank correlation of the scores."""
    n = len(agreement["labels"])
    values = np.full((n, n), np.nan)
    for i in range(n):
        for j in range(n):
            if i != j:
                value = (agreement["jaccard"] if i > j else agreement["spearman"])[i][j]
                values[i, j] = np.nan if value is None else value
    ax.imshow(np.abs(values), cmap="Greys", vmin=0, vmax=1.6)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(j, i, f"{value:.2f}".replace("-0.00", "0.00"), ha="center", va="center", fontsize=7)
    ax.set_xticks(range(n), agreement["labels"], rotation=35, ha="right")
    ax.set_yticks(range(n), agreement["labels"])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("below: Jaccard of kept rows, above: rank correlation", fontsize=7, loc="left")


def named(metric: str) -> str:
    """A metric's name for an axis, with its direction."""
    better = "lower" if is_loss(metric) else "higher"
    return f"{metric.replace('.', ', ').replace('_', ' ')} ({better} is better)"
