"""Put the scores of two pools into one run folder, so that `keepset run` selects, trains and compares over both.

python experiments/mixed-pool/merge.py RECIPE --scored RUN [RUN ...]

RECIPE's pool holds the rows of all the RUNs. Its methods that run a model take each row's score from the RUN that holds
it: DavIR, RDS, ROSE and LESS score a row by itself, given the reference, the checkpoint and the target. Text methods
and controls are left to `keepset run`, since BM25 and DSIR weigh a row against its pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

from keepset.job import Job
from keepset.recipe import MethodSpec, load_recipe
from keepset.run import Run
from keepset.scoring import METHODS, ranking, score_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--scored", nargs="+", type=Path, required=True)
    options = parser.parse_args()
    job = Job(load_recipe(options.recipe))
    for spec in job.recipe.methods:
        if METHODS[spec.name].cost not in ("free", "text"):
            merge(job, spec, options.scored)


def merge(job: Job, spec: MethodSpec, runs: list[Path]) -> None:
    """Write `scores/<label>.parquet` for the job's rows.

    Raises:
        KeyError: a row that no run has scored.
    """
    name = f"scores/{spec.label}.parquet"
    tables = [Run(run).load_table(name) for run in runs]
    both = pa.concat_tables([t.drop_columns(["category", "rank", "selected"]) for t in tables])
    place = {row_id: i for i, row_id in reversed(list(enumerate(both["id"].to_pylist())))}
    table = both.take(pa.array([place[str(i)] for i in job.ids]))
    values = table["score"].to_numpy()
    rank = np.zeros(len(values), dtype=np.int64)
    rank[ranking(values, job.ids)] = np.arange(1, len(values) + 1)
    subset = job.pool.table.take(pa.array(job.usable))
    for column, content in (("category", subset["category"]), ("rank", pa.array(rank)),
                            ("selected", pa.array(np.zeros(len(values), dtype=bool)))):  # fmt: skip
        table = table.append_column(column, content)
    table = table.set_column(table.column_names.index("source"), "source", subset["source"])
    job.run.save_table(name, table.replace_schema_metadata(tables[0].schema.metadata), key=score_key(job, spec))
    job.say(f"{name}: {len(values)} rows from {len(runs)} runs")


if __name__ == "__main__":
    main()
