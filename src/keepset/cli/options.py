"""What commands share: their options, the terminal, and the job of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from keepset.errors import RecipeError
from keepset.runfolder import layout

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
ExecutorName = Annotated[str | None, typer.Option("--executor", help="who computes: forks (this machine) or ray")]
Address = Annotated[
    str | None, typer.Option("--address", help="of a Ray cluster, or `auto`; default: Ray started here")
]

err = Console(stderr=True)


def hush(quiet: bool) -> bool:
    """`--quiet`: progress goes nowhere; results and mistakes are printed all the same."""
    err.quiet = quiet
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=hush, help="no progress, only results and mistakes")]


def apply_setting(data: dict[str, Any], text: str, option: str = "--set") -> None:
    """Apply `a.b.c=value` (the value is YAML), given by `option`, to nested mappings and lists."""
    import yaml

    from keepset.keys import set_key

    key, separator, value = text.partition("=")
    if not separator:
        raise RecipeError(f"{option} '{text}': write it as key=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{option} '{text}': not YAML: {getattr(error, 'problem', error)}") from None
    set_key(data, key, parsed)


def executor_settings(executor: str | None, address: str | None) -> list[str]:
    """`--executor` and `--address` as settings of the recipe."""
    given = (("name", executor), ("address", address))
    return [f"executor.{key}={value}" for key, value in given if value is not None]


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
    from keepset.recipe import parse_recipe
    from keepset.runfolder.run import Run
    from keepset.stages.job import Job

    path = run_dir / layout.RECIPE
    data: dict[str, Any] = Run(run_dir).recipe().model_dump(mode="json") if path.exists() else {"methods": []}
    if not path.exists() and not pool:
        raise RecipeError(
            f"{run_dir} is no run folder yet; start one with `keepset run` or `keepset score METHOD --pool FILE`"
        )
    data["run_dir"] = str(run_dir)
    if pool:
        data["pool"] = pool
    if target:
        data["target"] = target
    if model:
        data.setdefault("model", {})["model_name_or_path"] = model
    for text in settings or []:
        apply_setting(data, text)
    labels = [m["label"] if isinstance(m, dict) else m for m in data["methods"]]
    for method in methods or []:
        data["methods"] = [m for m in data["methods"] if (m["label"] if isinstance(m, dict) else m) != method["label"]]
        data["methods"].append(method)
    if not data["methods"]:
        raise RecipeError(f"{run_dir}: nothing scored yet; start with `keepset score METHOD`; known: {labels}")
    return Job(parse_recipe(data, where="options"), console=err, force=force, text_only=text_only)
