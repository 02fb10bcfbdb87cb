"""Run a recipe, or one of its steps on a run folder; heavy imports are inside, so that `--help` is quick."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from keepset.cli.options import (
    Address,
    AsJson,
    ExecutorName,
    Force,
    Model,
    Options,
    Pools,
    Quiet,
    RunDir,
    Targets,
    apply_setting,
    err,
    executor_settings,
    open_job,
)
from keepset.errors import KeepsetError, RecipeError
from keepset.runfolder import layout
from keepset.runfolder.files import json_text


def run(
    recipe: Annotated[Path, typer.Argument(help="the recipe's YAML file")],
    run_dir: Annotated[Path | None, typer.Option("--run_dir", "--run-dir", help="instead of the recipe's")] = None,
    settings: Options = None,
    executor: ExecutorName = None,
    address: Address = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="only say what it would cost")] = False,
    quiet: Quiet = False,
) -> None:
    """Score, select, train, evaluate and compare, as a recipe says; a second call does only what is missing.

    Example: keepset run recipe.yaml
    """
    from keepset.recipe import load_recipe, parse_recipe

    loaded = load_recipe(recipe)
    settings = [*(settings or []), *executor_settings(executor, address)]
    if settings or run_dir:
        data = loaded.model_dump(mode="json")
        for text in settings:
            apply_setting(data, text)
        if run_dir:
            data["run_dir"] = str(run_dir)
        loaded = parse_recipe(data, where=str(recipe))
    if dry_run:
        from keepset.pipeline.plan import plan_recipe, print_plan

        print_plan(plan_recipe(loaded, console=err), Console())
        return
    from keepset.pipeline import run_recipe

    run_recipe(loaded, console=err, force=force)


def plan(
    recipe: Annotated[Path, typer.Argument(help="the recipe's YAML file")],
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="plan for GPUs instead of this machine: h100:8 is eight on each node")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="with --gpus: machines")] = 1,
    price: Annotated[float | None, typer.Option("--price", min=0, help="with --gpus: of one GPU for an hour")] = None,
    network: Annotated[float, typer.Option("--network", min=1e-3, help="with --gpus: Gbit/s of a node")] = 10.0,
    shared: Annotated[bool, typer.Option("--shared/--local", help="with --gpus: all nodes see the run folder")] = True,
    utilisation: Annotated[
        float, typer.Option("--utilisation", min=1e-3, max=1, help="with --gpus: share of a GPU's peak")
    ] = 0.35,
    like: Annotated[
        Path | None, typer.Option("--like", help="with --gpus: a run folder whose measured rates are each worker's")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="with --gpus: as if the pool had so many")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would cost here, from a short probe; or, with --gpus, on a cluster, from counts alone.

    Stages, tokens, FLOPs, seconds, memory; on a cluster also cost, network and disk, and nothing of the model but its
    config and tokenizer is needed.

    Example: keepset plan recipe.yaml --gpus h100:8 --nodes 8 --price 2.5 --rows 10000000
    """
    from keepset.recipe import load_recipe

    if gpus is None:
        from keepset.pipeline.plan import plan_recipe, print_plan

        given = {"--nodes": nodes != 1, "--price": price is not None, "--network": network != 10, "--local": not shared,
                 "--utilisation": utilisation != 0.35, "--like": like, "--rows": rows}  # fmt: skip
        for name in (name for name, value in given.items() if value):
            raise RecipeError(f"{name}: a plan for this machine doesn't look at it; name the GPUs: --gpus h100:8")
        facts = plan_recipe(load_recipe(recipe), console=err)
        show = print_plan
    else:
        from keepset.pipeline.cluster import Cluster, parse_gpus
        from keepset.pipeline.plan_cluster import plan_cluster, print_cluster

        cluster = Cluster(*parse_gpus(gpus), nodes, price, network, shared, utilisation)
        facts = plan_cluster(load_recipe(recipe), cluster, rows=rows, like=like, console=err)
        show = print_cluster
    if as_json:
        print(json_text(facts))
    else:
        show(facts, Console())


def demo(run_dir: RunDir = Path("runs/demo"), force: Force = False, quiet: Quiet = False) -> None:
    """Run the whole job on the small model and data that ship: ROSE, LESS, DavIR, BM25, and what they are held against.

    Example: keepset demo
    """
    from importlib.resources import as_file, files

    from keepset.pipeline import run_recipe
    from keepset.recipe import load_recipe

    with as_file(files("keepset") / "demo") as folder:
        loaded = load_recipe(folder / layout.RECIPE).model_copy(update={"run_dir": str(run_dir)})
        run_recipe(loaded, console=err, force=force)


def score(
    method: Annotated[str, typer.Argument(help="see `keepset methods`")],
    run_dir: RunDir = Path("runs/keepset"),
    pool: Pools = None,
    target: Targets = None,
    model_name_or_path: Model = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="of the method: -o reduce=mean")] = None,
    label: Annotated[str | None, typer.Option("--label", help="name of this variant; default: the method's")] = None,
    settings: Options = None,
    executor: ExecutorName = None,
    address: Address = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score every row of a pool by one method into RUN_DIR/scores/LABEL.parquet.

    Example: keepset score bm25 --pool pool.jsonl --target shots.jsonl --run_dir runs/mine
    """
    import importlib.util

    from keepset.methods.table import check_options, find_method, needs_model
    from keepset.pipeline.findings import diagnose_scores, record
    from keepset.pipeline.score import score as score_job
    from keepset.recipe import MethodSpec, check_label

    find_method(method)
    check_label(label or method)

    options: dict[str, Any] = {}
    for text in option or []:
        apply_setting(options, text, "-o")
    spec = MethodSpec(name=method, label=label or method, options=options)
    check_options(spec)
    has_model = importlib.util.find_spec("transformers") is not None
    if needs_model(method) and not has_model:
        raise KeepsetError(f"{method} runs a model: pip install 'keepset[train]' (torch first, see the README)")
    text_only = not needs_model(method) and not (model_name_or_path and has_model)
    settings = [*(settings or []), *executor_settings(executor, address)]
    job = open_job(
        run_dir, pool=pool, target=target, model=model_name_or_path, settings=settings,
        methods=[spec.model_dump()], force=force, text_only=text_only,
    )  # fmt: skip
    with job.run.lock():
        table = score_job(job, spec)
        record(job, diagnose_scores(table, spec.label, folds=job.recipe.reference.folds))
    if as_json:
        scored = table.num_rows - table["score"].null_count
        quarantined = job.pool.n_in - scored
        print(json_text({"label": spec.label, "rows_in": job.pool.n_in, "scored": scored, "quarantined": quarantined,
                          "file": str(run_dir / layout.scores(spec.label))}))  # fmt: skip


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
        str | None, typer.Option("--policy", help="top_k round_robin knn_kde transport mmr facility_location sample")
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
    from keepset.budget_text import parse_budget
    from keepset.data.export import write_subset
    from keepset.pipeline.choose import choose
    from keepset.pipeline.findings import diagnose_edge, diagnose_shares, record

    given = (("policy", policy), ("quota", quota), ("quota_by", quota_by), ("dedup", dedup))
    settings = [f"select.{k}={v}" for k, v in given if v]
    if budget:
        parse_budget(budget, 1, None)
    probe = open_job(run_dir)
    words = (probe.run.load_table(layout.scores(label), lambda name: False).schema.metadata or {}).get(
        b"length_unit"
    ) == b"words"
    job = open_job(
        run_dir, settings=[*settings, *([f"budget={budget}"] if budget else [])], force=True, text_only=words
    )
    with job.run.lock():
        subset = choose(job, label, job.recipe.budget[0], overrides=overrides)
        table = job.run.load_table(layout.scores(label))
        shares = diagnose_shares(table, subset.name, subset.ids(job))
        record(job, diagnose_edge(subset) + shares)
        for finding in shares:
            if finding.level == "info":  # warnings are printed by `record`
                job.say(f"  {finding.text}")
        if out is not None:
            write_subset(job.pool, job.usable[subset.indices], out, to=to)
    if as_json:
        print(json_text({"name": subset.name, "rows": subset.n_rows, "tokens": subset.n_tokens}))


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
    from keepset.pipeline.learn import Learner, evaluate_final

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
    print(json_text(summary, indent=1))


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
    from keepset.pipeline.compare import compare as compare_cells
    from keepset.pipeline.compare import print_comparison
    from keepset.pipeline.findings import COMPARED, diagnose_comparison, record
    from keepset.pipeline.run import evaluated_cells
    from keepset.pipeline.verdict import print_verdict

    job = open_job(run_dir)
    with job.run.lock():
        result = compare_cells(job, evaluated_cells(job))
        record(job, diagnose_comparison(result), anew=COMPARED)
    if as_json:
        print(json_text(result.to_json()))
    else:
        print_comparison(result, Console())
        if more:
            print_verdict(result, Console())


def validate(
    run_dir: Annotated[Path, typer.Argument(help="a run folder with scores")] = Path("runs/keepset"),
    settings: Options = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="only say what it would cost")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say how well each score tells what training does: trainings on random halves, with rows left out, on tenths.

    What is trained stands under `validate` in the recipe; without it, 60 halves of 200 rows. A second call does only
    what is missing.

    Example: keepset validate runs/mine --set validate.models=30 --set validate.rows=100
    """
    from keepset.pipeline.plan import plan_validation, print_steps
    from keepset.pipeline.tell_truth import print_validation
    from keepset.pipeline.validate import validate as judge_scores

    if not (run_dir / layout.RECIPE).exists():
        raise RecipeError(f"{run_dir} is no run folder; `keepset run` or `keepset score` makes one")
    job = open_job(run_dir, settings=settings)
    if dry_run:
        print_steps(plan_validation(job), Console())
        return
    with job.run.lock():
        result = judge_scores(job)
    if as_json:
        print(json_text(result.to_json()))
    else:
        print_validation(result, Console())


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
    from keepset.deliver.reproduce import print_reproduction
    from keepset.deliver.reproduce import reproduce as run_again

    folder = (manifest if manifest.is_dir() else manifest.parent).resolve()
    result = run_again(manifest, run_dir or folder.with_name(folder.name + "-again"), console=err)
    if as_json:
        print(json_text(asdict(result)))
    else:
        print_reproduction(result, Console())
    if not result.equal:
        raise typer.Exit(5)
