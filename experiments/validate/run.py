"""Score by every method of the recipe and validate, without training on the choices: `python run.py [RECIPE]`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from keepset.pipeline.score import scored
from keepset.pipeline.tell_truth import print_validation
from keepset.pipeline.validate import validate
from keepset.recipe import load_recipe
from keepset.runfolder import layout
from keepset.stages.job import Job

HERE = Path(__file__).parent

job = Job(load_recipe(sys.argv[1] if len(sys.argv) > 1 else HERE / "recipe.yaml"))
with job.run.lock():
    for spec in job.recipe.methods:
        scored(job, spec)
    result = validate(job)
(HERE / "results").mkdir(exist_ok=True)
shutil.copy(job.run.path / layout.VALIDATION, HERE / "results" / layout.VALIDATION)
with (HERE / "results/table.txt").open("w", encoding="utf-8") as file:
    print_validation(result, Console(file=file, width=100))
