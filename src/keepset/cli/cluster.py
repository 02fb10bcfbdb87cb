"""Several processes or machines on one run; heavy imports are inside, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from keepset.cli.options import Quiet, err
from keepset.runfolder.claims import PATIENCE


def work_on(
    run: Annotated[Path, typer.Argument(help="a run folder, or a recipe file")],
    patience: Annotated[
        float, typer.Option("--patience", min=1, help="seconds without a sign of life after which a worker is dead")
    ] = PATIENCE,
    quiet: Quiet = False,
) -> None:
    """Take part in a run as one of several workers: start it as often as you like, on all that share the run folder.

    The workers need no rendezvous: a Slurm array, torchrun, Kubernetes or a loop in a shell may start them.

    Example: keepset work recipe.yaml
    """
    from keepset.deliver.work import work as take_part
    from keepset.recipe import load_recipe
    from keepset.runfolder.run import Run

    recipe = Run(run).recipe() if run.is_dir() else load_recipe(run)
    take_part(recipe, console=err, out=Console(), patience=patience)
