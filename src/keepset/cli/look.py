"""Look at methods, data, runs and rows; heavy imports are inside, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from keepset.cli.options import AsJson, Model, Quiet, RunDir, Targets, err
from keepset.runfolder.files import json_text


def methods(
    name: Annotated[str | None, typer.Argument(help="one method: its options")] = None, as_json: AsJson = False
) -> None:
    """List the methods: paper, formula, what each needs and costs; or one method's options.

    Example: keepset methods rose
    """
    from keepset.methods.table import METHODS, find_method

    if as_json:
        rows = [find_method(n) for n in ([name] if name else METHODS)]
        facts = [{"name": m.name, "paper": m.paper, "formula": m.formula, "when": m.when, "needs": list(m.needs),
                  "cost": m.cost, "options": {k: default for k, (_, default) in m.options().items()}}
                 for m in rows]  # fmt: skip
        print(json_text(facts))
        return
    console = Console()
    if name:
        row = find_method(name)
        console.print(
            f"{name}: {row.paper}\n  {row.formula}\n  needs {', '.join(row.needs)}; cost: {row.cost}\n"
            f"  take it {row.when}", highlight=False, soft_wrap=True,
        )  # fmt: skip
        for option, (kind, default) in row.options().items():
            choices = " | ".join(map(str, getattr(kind, "__args__", ()))) or kind.__name__
            console.print(f"  -o {option}={default}   ({choices})", highlight=False, markup=False)
        return
    table = Table("method", "paper", "formula", "needs", "cost")
    for key, row in METHODS.items():
        table.add_row(key, row.paper, row.formula, ", ".join(row.needs), row.cost)
    console.print(table)


def overlap(
    scorings: Annotated[list[str], typer.Argument(help="two or more: RUN_DIR (its first method) or RUN_DIR:LABEL")],
    budget: Annotated[list[str] | None, typer.Option("--budget", help="size of the top sets; may be repeated")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far scorings of one pool agree: rank correlation, overlap of the top rows, lengths of what they keep.

    Example: keepset overlap runs/in-sample runs/cross-fitted --budget 5% --budget 10%
    """
    from keepset.report.overlap import print_agreement, stored_scores
    from keepset.selection.agreement import SHARES, agreement

    result = agreement({place: stored_scores(place) for place in scorings}, budget or SHARES)
    if as_json:
        print(json_text(result.to_json()))
    else:
        print_agreement(result, Console())


def report(
    run_dir: RunDir = Path("runs/keepset"),
    out: Annotated[Path | None, typer.Option("--out", help="default: RUN_DIR/report.html")] = None,
    why: Annotated[
        bool, typer.Option("--why", help="first run the models over the kept rows: their tokens, their validation rows")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the run's report: one self-contained HTML page.

    Example: keepset report --run_dir runs/demo
    """
    from keepset.report import write_report

    if why:
        from keepset.report.explain import write_why

        write_why(run_dir, console=err)

    print(write_report(run_dir, out))


def plot(
    run_dir: RunDir = Path("runs/keepset"),
    out: Annotated[Path | None, typer.Option("--out", help="folder; default: RUN_DIR/plots")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="png svg pdf; may be repeated")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="scores length losses comparison curve overlap; may be repeated")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="of the comparison: loss.chosen; may be repeated")
    ] = None,
    width: Annotated[float, typer.Option("--width", help="inches")] = 3.3,
) -> None:
    """Draw a run's figures for papers: score histogram with the cut, score against length, comparison, overlap ...

    Example: keepset plot --run_dir runs/demo --format svg --only comparison
    """
    from keepset.report.plot import write_plots

    chosen = {"formats": formats or ("png", "svg"), "only": only or (), "metrics": metric or ()}
    for path in write_plots(run_dir, out, width=width, **chosen):
        print(path)


def inspect(
    data: Annotated[str, typer.Argument(help="file, folder or hub name")],
    target: Targets = None,
    evaluation: Annotated[list[str] | None, typer.Option("--pairs", help="held-out pairs that must not leak")] = None,
    model_name_or_path: Model = None,
    as_json: AsJson = False,
) -> None:
    """Say what a data file holds and what is wrong with it: format, lengths, roles, copies, bad rows, leaks.

    Example: keepset inspect pool.jsonl --model_name_or_path demo
    """
    from keepset.recipe import ModelSpec
    from keepset.report.inspect import inspect_data, print_inspection

    model = ModelSpec(model_name_or_path=model_name_or_path) if model_name_or_path else None
    facts = inspect_data(data, target=target or (), evaluation=evaluation or (), model=model)
    if as_json:
        print(json_text(facts))
    else:
        print_inspection(facts, Console())


def explain(
    row: Annotated[str, typer.Argument(help="a row's id, or its beginning")],
    run_dir: RunDir = Path("runs/keepset"),
    label: Annotated[str | None, typer.Option("--label", help="which method; default: the first")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="DavIR: the tokens whose loss fell (runs the models)")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="ROSE, LESS: the validation rows that pulled it (runs the model)")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say why a row was kept or dropped: its score's parts, rank, neighbours, and what would change it.

    Example: keepset explain 3f2a --label davir --run_dir runs/demo
    """
    from keepset.report.explain import explain as explain_row
    from keepset.report.explain import print_explanation

    facts = explain_row(run_dir, row, label)
    if tokens:
        from keepset.report.explain_tokens import print_token_changes, token_changes

        changes = token_changes(run_dir, facts["id"])
        if not as_json:
            print_token_changes(changes, Console())
        facts["tokens"] = changes
    if pairs:
        from keepset.report.explain_pairs import pair_pulls, print_pair_pulls

        facts["pairs"] = pair_pulls(run_dir, [facts["id"]], label)[facts["id"]]
        if not as_json:
            print_pair_pulls(facts["pairs"], Console())
    if as_json:
        print(json_text(facts))
    else:
        print_explanation(facts, Console())


def status(
    run_dir: Annotated[Path, typer.Argument(help="a run folder")] = Path("runs/keepset"), as_json: AsJson = False
) -> None:
    """Say how far a run is: steps done, under way and next, time left, price, who is at it; it only reads.

    Example: keepset status runs/demo
    """
    from keepset.runfolder.status import status as look
    from keepset.runfolder.status import told

    found = look(run_dir)
    print(json_text(found.to_json()) if as_json else "\n".join(told(run_dir, found)))


def doctor(model_name_or_path: Model = None, as_json: AsJson = False) -> None:
    """Print versions, device, memory, disk and whether the model and its template load: for bug reports.

    Example: keepset doctor --model_name_or_path demo
    """
    from keepset.report.doctor import examine, print_examination

    facts = examine(model_name_or_path)
    if as_json:
        print(json_text(facts))
    else:
        print_examination(facts, Console())
