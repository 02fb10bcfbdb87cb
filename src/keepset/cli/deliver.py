"""Write recipes, and hand the chosen rows on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepset.cli.options import RunDir, open_job
from keepset.errors import RecipeError
from keepset.runfolder import layout
from keepset.runfolder.files import write_atomic


def init(
    path: Annotated[Path, typer.Argument(help="where to write it")] = Path(layout.RECIPE),
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="write a config for `accelerate launch` with FSDP instead")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="write a job for `sbatch` instead: an array of workers")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="write a file for `ray up` instead: a cluster")] = False,
) -> None:
    """Write a commented recipe to start from, or a file for several GPUs or machines (not yet run on any).

    Example: keepset init recipe.yaml
    """
    from importlib.resources import files

    if path.exists():
        raise RecipeError(f"{path} exists already; name another file")
    if accelerate + slurm + ray > 1:
        raise RecipeError("--accelerate, --slurm and --ray write different files; give one of them")
    source, then = "start.yaml", f"now put in your pool, target and model, then `keepset run {path}`"
    if accelerate:
        source = "accelerate_fsdp.yaml"
        then = f"accelerate launch --config_file {path} -m keepset train sft --data ... --output_dir ..."
    elif slurm:
        source, then = "slurm.sbatch", f"now put in your partition and environment, then `sbatch {path} recipe.yaml`"
    elif ray:
        source, then = "ray_cluster.yaml", f"now put in your provider and machines, then `ray up {path}`"
    write_atomic(path, (files("keepset") / source).read_bytes())
    print(f"{path}: {then}")


def export(
    subset: Annotated[str, typer.Argument(help="a subset of the run folder, or `full`")],
    out: Annotated[Path, typer.Argument(help="file to write")],
    run_dir: RunDir = Path("runs/keepset"),
    to: Annotated[str | None, typer.Option("--to", help="jsonl parquet csv messages alpaca sharegpt")] = None,
    weight: Annotated[
        str | None,
        typer.Option("--weight", help="also a column of weights, 1 on average: softmax or rank of the score"),
    ] = None,
    weight_by: Annotated[
        str | None, typer.Option("--weight_by", "--weight-by", help="label of the score; default: the subset's own")
    ] = None,
    weight_column: Annotated[
        str, typer.Option("--weight_column", "--weight-column", help="the column's name")
    ] = "weight",
    temperature: Annotated[float, typer.Option("--temperature", help="softmax: of the standardised score")] = 1.0,
) -> None:
    """Write a subset in another dialect or container; with weights for `keepset train sft --weight_column`.

    Example: keepset export davir chosen.parquet --to messages
    """
    from keepset.data.export import write_subset
    from keepset.pipeline.choose import chosen_places, stored_ids
    from keepset.pipeline.weights import subset_weights

    job = open_job(run_dir, text_only=True)
    wanted = stored_ids(job, subset)
    places = chosen_places(job.pool.ids, wanted, subset)
    extra = None
    if weight is not None:
        extra = weight_column, subset_weights(job, subset, wanted, weight, by=weight_by, temperature=temperature)
    else:
        given = {
            "--weight_by": weight_by,
            "--weight_column": weight_column != "weight",
            "--temperature": temperature != 1,
        }
        for name in (name for name, value in given.items() if value):
            raise RecipeError(f"{name} does nothing without --weight; add --weight softmax or rank")
    write_subset(job.pool, places, out, to=to, extra=extra)
    print(f"{out}: {len(wanted)} rows")


def trainers(
    subset: Annotated[str, typer.Argument(help="a subset of the run folder, or `full`")],
    run_dir: RunDir = Path("runs/keepset"),
) -> None:
    """Write RUN_DIR/trainers: the rows and ready configs for TRL, axolotl and LLaMA-Factory.

    `keepset run` does it for its first method.

    Example: keepset trainers davir --run_dir runs/mine
    """
    from keepset.deliver.trainers import write_trainers
    from keepset.pipeline.choose import stored_subset

    job = open_job(run_dir)
    with job.run.lock():
        for name in write_trainers(job, stored_subset(job, subset)):
            print(run_dir / name)


def push(
    repo_id: Annotated[str, typer.Argument(help="user/name on the hub")],
    run_dir: RunDir = Path("runs/keepset"),
    public: Annotated[bool, typer.Option("--public", help="for everybody to see; default: a private one")] = False,
) -> None:
    """Push a finished run's chosen rows, scores, card and manifest to a dataset repository of the Hugging Face hub.

    Example: keepset push me/chosen-by-rose --run_dir runs/mine
    """
    from keepset.deliver.hub import push_to_hub

    print(push_to_hub(run_dir, repo_id, private=not public))
