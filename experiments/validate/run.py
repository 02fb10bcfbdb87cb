"""Score by every method of the recipe and validate, without training on the choices: `python run.py [RECIPE]`.

Writes results/NAME.json and NAME.txt, NAME being the recipe's, and NAME-prices.json: operations of each score alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from keepset.pipeline.price import full_training_flops, selection_work
from keepset.pipeline.score import scored
from keepset.pipeline.tell_truth import print_validation
from keepset.pipeline.validate import validate
from keepset.recipe import load_recipe
from keepset.runfolder import layout
from keepset.stages.job import Job

HERE = Path(__file__).parent

recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "bank.yaml"
job = Job(load_recipe(recipe))
with job.run.lock():
    for spec in job.recipe.methods:
        scored(job, spec)
    result = validate(job)
results = HERE / "results"
results.mkdir(exist_ok=True)
shutil.copy(job.run.path / layout.VALIDATION, results / f"{recipe.stem}.json")
prices = {spec.label: sum(w.flops for w in selection_work(job, [spec])) for spec in job.recipe.methods}
prices["one training on the pool"] = full_training_flops(job)
(results / f"{recipe.stem}-prices.json").write_text(json.dumps(prices, indent=1) + "\n", encoding="utf-8")
with (results / f"{recipe.stem}.txt").open("w", encoding="utf-8") as file:
    print_validation(result, Console(file=file, width=100))
