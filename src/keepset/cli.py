"""The command line: parse, call, print. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from keepset.cli_judge import generate, judge, lm_eval, pairs
from keepset.cli_train import train_app
from keepset.errors import KeepsetError, RecipeError
from keepset.stopping import GOES_ON, Stopped, stop_on_signals, system_trouble

app = typer.Typer(
    help="Choose post-training data for language models, and hold the choice against a random one of its size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunDir = Annotated[Path, typer.Option("--run_dir", "--run-dir", help="the run folder")]
Force = Annotated[bool, typer.Option("--force", help="go on in a folder made by another recipe")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on standard output")]
Pools = Annotated[list[str] | None, typer.Option("--pool", help="pool file, folder or hub name; may be repeated")]
Targets = Annotated[list[str] | None, typer.Option("--target", help="validation rows or pairs; may be repeated")]
Model = Annotated[
    str | None,
    typer.Option("--model_name_or_path", "--model-name-or-path", help="hub name, folder, .gguf file, or `demo`"),
]
Options = Annotated[
    list[str] | None, typer.Option("--set", help="any recipe key: --set warmup.fraction=0.1; may be repeated")
]

app.add_typer(train_app, name="train")
app.command()(generate)
app.command()(judge)
app.command()(pairs)
app.command("lm-eval")(lm_eval)
err = Console(stderr=True)


def hush(quiet: bool) -> bool:
    """`--quiet`: progress goes nowhere; results and mistakes are printed all the same."""
    err.quiet = quiet
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=hush, help="no progress, only results and mistakes")]


def apply_setting(data: dict[str, Any], text: str) -> None:
    """Apply `a.b.c=value` (the value is YAML) to nested mappings and lists."""
    import yaml

    from keepset.recipe import set_key

    key, separator, value = text.partition("=")
    if not separator:
        raise RecipeError(f"--set '{text}': write it as key=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set '{text}': not YAML: {getattr(error, 'problem', error)}") from None
    set_key(data, key, parsed)


def open_job(
    run_dir: Path,
    *,
    pool: list[str] | None = None,
    target: list[str] | None = None,
    model: str | None = None,
    settings: list[str] | None = None,
    methods: list[dict[str, Any]] | None = None,
    force: bool = False,
    text_only: bool = False,
) -> Any:
    """The job of a run folder: its stored recipe, or a new one from the options."""
    from keepset.job import Job
    from keepset.recipe import parse_recipe
    from keepset.run import Run

    path = run_dir / "recipe.yaml"
    data: dict[str, Any] = Run(run_dir).recipe_data() if path.exists() else {"methods": []}
    if not path.exists() and not pool:
        raise RecipeError(f"{run_dir} is no run folder yet: name a --pool to start one")
    data["run_dir"] = str(run_dir)
    if pool:
        data["pool"] = pool
    if target:
        data["target"] = target
    if model:
        data.setdefault("model", {})["model_name_or_path"] = model
    for text in settings or []:
        apply_setting(data, text)
    known = [m["label"] if isinstance(m, dict) else m for m in data["methods"]]
    for method in methods or []:
        data["methods"] = [m for m in data["methods"] if (m["label"] if isinstance(m, dict) else m) != method["label"]]
        data["methods"].append(method)
    if not data["methods"]:
        raise RecipeError(f"{run_dir}: nothing scored yet; start with `keepset score METHOD`; known: {known}")
    return Job(parse_recipe(data, where="options"), console=err, force=force, text_only=text_only)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="the recipe's YAML file")],
    run_dir: Annotated[Path | None, typer.Option("--run_dir", "--run-dir", help="instead of the recipe's")] = None,
    settings: Options = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="only say what it would cost")] = False,
    quiet: Quiet = False,
) -> None:
    """Score, select, train, evaluate and compare, as a recipe says; a second call does only what is missing.

    Example: keepset run recipe.yaml
    """
    from keepset.recipe import load_recipe, parse_recipe

    loaded = load_recipe(recipe)
    if settings or run_dir:
        data = loaded.model_dump(mode="json")
        for text in settings or []:
            apply_setting(data, text)
        if run_dir:
            data["run_dir"] = str(run_dir)
        loaded = parse_recipe(data, where=str(recipe))
    if dry_run:
        from keepset.plan import plan_recipe, print_plan

        print_plan(plan_recipe(loaded, console=err), Console())
        return
    from keepset.pipeline import run_recipe

    run_recipe(loaded, console=err, force=force)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="the recipe's YAML file")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would cost here: stages, tokens, FLOPs, seconds, memory; from a short probe.

    Example: keepset plan recipe.yaml
    """
    from keepset.plan import plan_recipe, print_plan
    from keepset.recipe import load_recipe

    found = plan_recipe(load_recipe(recipe), console=err)
    if as_json:
        print(json.dumps(found))
    else:
        print_plan(found, Console())


@app.command()
def demo(run_dir: RunDir = Path("runs/demo"), force: Force = False, quiet: Quiet = False) -> None:
    """Run the whole job on the small model and data that ship: ROSE, DavIR, Random and the longest rows.

    Example: keepset demo
    """
    from importlib.resources import as_file, files

    from keepset.pipeline import run_recipe
    from keepset.recipe import load_recipe

    with as_file(files("keepset") / "demo") as folder:
        loaded = load_recipe(folder / "recipe.yaml").model_copy(update={"run_dir": str(run_dir)})
        run_recipe(loaded, console=err, force=force)


@app.command()
def score(
    method: Annotated[str, typer.Argument(help="see `keepset methods`")],
    run_dir: RunDir = Path("runs/keepset"),
    pool: Pools = None,
    target: Targets = None,
    model_name_or_path: Model = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="of the method: -o reduce=mean")] = None,
    label: Annotated[str | None, typer.Option("--label", help="name of this variant; default: the method's")] = None,
    settings: Options = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score every row of a pool by one method into RUN_DIR/scores/LABEL.parquet.

    Example: keepset score bm25 --pool pool.jsonl --target shots.jsonl --run_dir runs/mine
    """
    import importlib.util

    from keepset.diagnose import diagnose_scores, record
    from keepset.recipe import MethodSpec, check_label
    from keepset.scoring import check_options, needs_model
    from keepset.scoring import method as find_method
    from keepset.scoring import score as score_job

    find_method(method)
    check_label(label or method)

    options: dict[str, Any] = {}
    for text in option or []:
        apply_setting(options, text)
    spec = MethodSpec(name=method, label=label or method, options=options)
    check_options(spec)
    has_model = importlib.util.find_spec("transformers") is not None
    if needs_model(method) and not has_model:
        raise KeepsetError(f"{method} runs a model: pip install 'keepset[train]' (torch first, see the README)")
    text_only = not needs_model(method) and not (model_name_or_path and has_model)
    job = open_job(
        run_dir, pool=pool, target=target, model=model_name_or_path, settings=settings,
        methods=[spec.model_dump()], force=force, text_only=text_only,
    )  # fmt: skip
    with job.run.lock():
        if text_only:
            job.save_quarantine([])
        table = score_job(job, spec)
        record(job, diagnose_scores(table, spec.label, folds=job.recipe.reference.folds))
    if as_json:
        scored = table.num_rows - table["score"].null_count
        quarantined = job.pool.n_in - scored
        print(json.dumps({"label": spec.label, "rows_in": job.pool.n_in, "scored": scored, "quarantined": quarantined,
                          "file": str(run_dir / "scores" / f"{spec.label}.parquet")}))  # fmt: skip


@app.command()
def select(
    label: Annotated[str, typer.Argument(help="a scored label of the run folder")],
    run_dir: RunDir = Path("runs/keepset"),
    budget: Annotated[str | None, typer.Option("--budget", help="500, 5% or '200000 tokens'")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="also write the rows here")] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="dialect of --out: jsonl parquet messages alpaca sharegpt csv")
    ] = None,
    overrides: Annotated[Path | None, typer.Option("--overrides", help="keep / drop marks from the report")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="top_k round_robin mmr facility_location sample")
    ] = None,
    quota: Annotated[str | None, typer.Option("--quota", help="none proportional equal floor")] = None,
    quota_by: Annotated[str | None, typer.Option("--quota_by", "--quota-by", help="source or category")] = None,
    dedup: Annotated[str | None, typer.Option("--dedup", help="none exact near")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Keep the best rows of a scored pool; the subset is written in the input's own dialect.

    Example: keepset select davir --budget 5% --out chosen.jsonl
    """
    from keepset.data.export import write_subset
    from keepset.diagnose import diagnose_edge, diagnose_shares, record
    from keepset.recipe import parse_budget
    from keepset.subsets import choose

    given = (("policy", policy), ("quota", quota), ("quota_by", quota_by), ("dedup", dedup))
    settings = [f"select.{k}={v}" for k, v in given if v]
    if budget:
        parse_budget(budget, 1, None)
    probe = open_job(run_dir)
    words = (probe.run.load_table(f"scores/{label}.parquet").schema.metadata or {}).get(b"length_unit") == b"words"
    job = open_job(
        run_dir, settings=[*settings, *([f"budget={budget}"] if budget else [])], force=True, text_only=words
    )
    with job.run.lock():
        subset = choose(job, label, job.recipe.budget[0], overrides=overrides)
        table = job.run.load_table(f"scores/{label}.parquet")
        shares = diagnose_shares(table, subset.name, subset.ids(job))
        record(job, diagnose_edge(subset) + shares)
        for finding in shares:
            if finding.level == "info":  # warnings are printed by `record`
                job.say(f"  {finding.text}")
        if out is not None:
            write_subset(job.pool, job.usable[subset.indices], out, to=to)
    if as_json:
        print(json.dumps({"name": subset.name, "rows": subset.n_rows, "tokens": subset.n_tokens}))


@app.command()
def evaluate(
    subset: Annotated[str, typer.Argument(help="a trained subset, or `base`")],
    run_dir: RunDir = Path("runs/keepset"),
    seed: Annotated[int, typer.Option("--seed")] = 0,
    pairs: Annotated[list[str] | None, typer.Option("--pairs", help="held-out chosen/rejected pairs")] = None,
    heldout: Annotated[list[str] | None, typer.Option("--heldout", help="held-out rows")] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a trained model on held-out pairs and rows; the untrained base beside it.

    Example: keepset evaluate davir --pairs eval.jsonl
    """
    from keepset.finals import Learner, evaluate_final

    settings = []
    if pairs:
        settings.append("evaluate.pairs=" + json.dumps([{"path": p} for p in pairs]))
    if heldout:
        settings.append("evaluate.heldout=" + json.dumps([{"path": p} for p in heldout]))
    job = open_job(run_dir, settings=settings, force=bool(settings))
    spec = job.recipe.evaluate
    if not (spec.pairs or spec.heldout or spec.gsm8k):
        raise RecipeError("nothing to evaluate on: name --pairs or --heldout")
    with job.run.lock():
        learner = Learner(job)
        summary, base = evaluate_final(job, learner, "base", None, None)
        if subset != "base":
            summary, _ = evaluate_final(job, learner, subset, seed, base)
    print(json.dumps(summary, indent=1))


@app.command()
def compare(
    run_dir: RunDir = Path("runs/keepset"),
    more: Annotated[
        bool, typer.Option("--more", help="also quality against cost, curves, validation loss against performance")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare everything the run folder has trained and evaluated, with intervals and paired tests against Random.

    Example: keepset compare --run_dir runs/mine --more
    """
    from keepset.compare import compare as compare_cells
    from keepset.compare import print_comparison
    from keepset.diagnose import COMPARED, diagnose_comparison, record
    from keepset.pipeline import evaluated_cells
    from keepset.verdict import print_verdict

    job = open_job(run_dir)
    with job.run.lock():
        result = compare_cells(job, evaluated_cells(job))
        record(job, diagnose_comparison(result), anew=COMPARED)
    if as_json:
        print(json.dumps(result))
    else:
        print_comparison(result, Console())
        if more:
            print_verdict(result, Console())


@app.command()
def overlap(
    scorings: Annotated[list[str], typer.Argument(help="two or more: RUN_DIR (its first method) or RUN_DIR:LABEL")],
    budget: Annotated[list[str] | None, typer.Option("--budget", help="size of the top sets; may be repeated")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far scorings of one pool agree: rank correlation, overlap of the top rows, lengths of what they keep.

    Example: keepset overlap runs/in-sample runs/cross-fitted --budget 5% --budget 10%
    """
    from keepset.overlap import SHARES, agreement, print_agreement, stored_scores

    result = agreement({place: stored_scores(place) for place in scorings}, budget or SHARES)
    if as_json:
        print(json.dumps(result))
    else:
        print_agreement(result, Console())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method: its options")] = None, as_json: AsJson = False
) -> None:
    """List the methods: paper, formula, what each needs and costs; or one method's options.

    Example: keepset methods rose
    """
    from keepset.scoring import METHODS, method, options_of

    if as_json:
        wanted = [name] if name else list(METHODS)
        found = [{"name": n, "paper": method(n).paper, "formula": method(n).formula, "needs": list(method(n).needs),
                  "cost": method(n).cost, "options": {k: d for k, (_, d) in options_of(n).items()}}
                 for n in wanted]  # fmt: skip
        print(json.dumps(found, ensure_ascii=False))
        return
    console = Console()
    if name:
        row = method(name)
        console.print(
            f"{name}: {row.paper}\n  {row.formula}\n  needs {', '.join(row.needs)}; cost: {row.cost}", highlight=False
        )
        for option, (kind, default) in options_of(name).items():
            choices = " | ".join(map(str, getattr(kind, "__args__", ()))) or kind.__name__
            console.print(f"  -o {option}={default}   ({choices})", highlight=False, markup=False)
        return
    table = Table("method", "paper", "formula", "needs", "cost")
    for key, row in METHODS.items():
        table.add_row(key, row.paper, row.formula, ", ".join(row.needs), row.cost)
    console.print(table)


@app.command()
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
        from keepset.why import write_why

        write_why(run_dir, console=err)

    print(write_report(run_dir, out))


@app.command()
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
    from keepset.plot import write_plots

    chosen = {"formats": formats or ("png", "svg"), "only": only or (), "metrics": metric or ()}
    for path in write_plots(run_dir, out, width=width, **chosen):
        print(path)


@app.command()
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
    from keepset.inspect_ import inspect_data, print_inspection
    from keepset.recipe import ModelSpec

    model = ModelSpec(model_name_or_path=model_name_or_path) if model_name_or_path else None
    facts = inspect_data(data, target=target or (), evaluation=evaluation or (), model=model)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print_inspection(facts, Console())


@app.command()
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
    from keepset.explain import explain as explain_row
    from keepset.explain import print_explanation

    facts = explain_row(run_dir, row, label)
    if tokens:
        from keepset.explain_tokens import print_token_changes, token_changes

        changes = token_changes(run_dir, facts["id"])
        if not as_json:
            print_token_changes(changes, Console())
        facts["tokens"] = changes
    if pairs:
        from keepset.explain_pairs import pair_pulls, print_pair_pulls

        facts["pairs"] = pair_pulls(run_dir, [facts["id"]], label)[facts["id"]]
        if not as_json:
            print_pair_pulls(facts["pairs"], Console())
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print_explanation(facts, Console())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write it")] = Path("recipe.yaml"),
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="write a config for `accelerate launch` with FSDP instead")
    ] = False,
) -> None:
    """Write a commented recipe to start from, or a config for training on several GPUs (FSDP; not yet run on any).

    Example: keepset init recipe.yaml
    """
    from importlib.resources import files

    if path.exists():
        raise RecipeError(f"{path} exists already; name another file")
    source = "accelerate_fsdp.yaml" if accelerate else "start.yaml"
    path.write_text((files("keepset") / source).read_text(encoding="utf-8"), encoding="utf-8")
    if accelerate:
        print(f"{path}: accelerate launch --config_file {path} -m keepset train sft --data ... --output_dir ...")
    else:
        print(f"{path}: now put in your pool, target and model, then `keepset run {path}`")


@app.command()
def doctor(model_name_or_path: Model = None, as_json: AsJson = False) -> None:
    """Print versions, device, memory, disk and whether the model and its template load: for bug reports.

    Example: keepset doctor --model_name_or_path demo
    """
    from keepset.doctor import examine, print_examination

    facts = examine(model_name_or_path)
    if as_json:
        print(json.dumps(facts))
    else:
        print_examination(facts, Console())


@app.command()
def export(
    subset: Annotated[str, typer.Argument(help="a subset of the run folder, or `full`")],
    out: Annotated[Path, typer.Argument(help="file to write")],
    run_dir: RunDir = Path("runs/keepset"),
    to: Annotated[str | None, typer.Option("--to", help="jsonl parquet csv messages alpaca sharegpt")] = None,
) -> None:
    """Write a subset in another dialect or container.

    Example: keepset export davir chosen.parquet --to messages
    """
    from keepset.data.export import write_subset
    from keepset.subsets import stored_ids

    job = open_job(run_dir, text_only=True)
    wanted = stored_ids(job, subset)
    place = {row_id: i for i, row_id in enumerate(job.pool.ids)}
    write_subset(job.pool, [place[i] for i in wanted], out, to=to)
    print(f"{out}: {len(wanted)} rows")


@app.command()
def trainers(
    subset: Annotated[str, typer.Argument(help="a subset of the run folder, or `full`")],
    run_dir: RunDir = Path("runs/keepset"),
) -> None:
    """Write RUN_DIR/trainers: the rows and ready configs for TRL, axolotl and LLaMA-Factory.

    `keepset run` does it for its first method.

    Example: keepset trainers davir --run_dir runs/mine
    """
    from keepset.subsets import stored_subset
    from keepset.trainers import write_trainers

    job = open_job(run_dir)
    with job.run.lock():
        for name in write_trainers(job, stored_subset(job, subset)):
            print(run_dir / name)


@app.command()
def push(
    repo_id: Annotated[str, typer.Argument(help="user/name on the hub")],
    run_dir: RunDir = Path("runs/keepset"),
    public: Annotated[bool, typer.Option("--public", help="for everybody to see; default: a private one")] = False,
) -> None:
    """Push a finished run's chosen rows, scores, card and manifest to a dataset repository of the Hugging Face hub.

    Example: keepset push me/chosen-by-rose --run_dir runs/mine
    """
    from keepset.hub import push_to_hub

    print(push_to_hub(run_dir, repo_id, private=not public))


@app.command()
def reproduce(
    manifest: Annotated[Path, typer.Argument(help="a run's manifest.json, or its folder")],
    run_dir: Annotated[
        Path | None, typer.Option("--run_dir", "--run-dir", help="the new folder; default: the old one's name + -again")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a manifest's recipe again in a new folder and compare hashes; exit code 5 if anything differs.

    Example: keepset reproduce runs/demo/manifest.json
    """
    from keepset.reproduce import print_reproduction
    from keepset.reproduce import reproduce as run_again

    folder = (manifest if manifest.is_dir() else manifest.parent).resolve()
    result = run_again(manifest, run_dir or folder.with_name(folder.name + "-again"), console=err)
    if as_json:
        print(json.dumps(result))
    else:
        print_reproduction(result, Console())
    if not result["equal"]:
        raise typer.Exit(5)


def complain(text: str) -> None:
    """Print a mistake in one line, also with `--quiet`."""
    Console(stderr=True).print(f"keepset: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run a command; what a user can mend is printed in one line, with its exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress lines say what is done
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no "…" gets "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logging.StreamHandler(sys.stderr)])
    try:
        stop_on_signals()
        app(standalone_mode=False)
    except KeepsetError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Stopped as stopped:
        err.print(f"keepset: stopped ({stopped}); {GOES_ON}", highlight=False)
        sys.exit(stopped.exit_code)
    except Exception as error:
        trouble = system_trouble(error)
        if trouble is not None:
            complain(trouble)
            sys.exit(2)
        show: Callable[..., None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
