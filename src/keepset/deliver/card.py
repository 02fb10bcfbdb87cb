"""The run folder as a dataset: the chosen rows under `data/`, all scores beside them, and a card that explains both.

`load_dataset(RUN)` gives the chosen rows with their original columns, `load_dataset(RUN, "scores")` every row's scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from keepset import __version__
from keepset.data.export_parquet import pool_table
from keepset.methods.table import METHODS
from keepset.pipeline.choose import Subset
from keepset.runfolder import layout
from keepset.runfolder.files import write_atomic

if TYPE_CHECKING:
    from keepset.stages.job import Job

CARD = """---
configs:
- config_name: default
  data_files: {{ rows }}
- config_name: scores
  data_files: {{ scores }}
tags:
- keepset
---
# {{ n_rows }} of {{ n_pool }} rows, chosen by {{ label }}

Chosen by keepset {{ version }} with **{{ label }}** ({{ paper }}): `{{ formula }}`,
budget {{ budget }}, seed {{ seed }}.

| | rows | supervised {{ unit }} |
|---|---|---|
| read | {{ n_in }} | |
| quarantined (`quarantine.jsonl`) | {{ n_quarantined }} | |
| scored | {{ n_pool }} | {{ pool_tokens }} |
| kept | {{ n_rows }} | {{ n_tokens }} |

Sources: {{ sources }}. The rows keep their original columns, and with them their licences.

* `data/`: the chosen rows. `subsets/`: every method's rows in the input's own dialect.
* `trainers/`: ready configs for TRL, axolotl and LLaMA-Factory on these rows.
* `scores/`: id, score, rank, parts, one file a method. `manifest.json`: recipe, versions, hashes, costs.
* Model that scored: `{{ model }}`. A choice made with one model need not fit another.

To do it again and compare hashes: `keepset reproduce manifest.json`.
"""


def write_dataset(job: Job, subset: Subset) -> None:
    """Write `data/` and `README.md` for the rows of one subset."""
    table = pool_table(job.pool.take(job.usable[subset.indices]), for_datasets=True)
    job.run.save_table(layout.ROWS, table)
    spec = next((m for m in job.recipe.methods if m.label == subset.label), None)
    method = METHODS[spec.name] if spec else None
    text = Environment(undefined=StrictUndefined, autoescape=False).from_string(CARD).render(
        rows=layout.ROWS, scores=layout.scores(subset.label), label=subset.label,
        paper=method.paper if method else "–", formula=method.formula if method else "–",
        version=__version__, budget=subset.budget, seed=job.recipe.seed, n_rows=subset.n_rows,
        n_pool=len(job.ids), n_in=job.pool.n_in, n_quarantined=job.pool.n_in - len(job.ids),
        n_tokens=subset.n_tokens, pool_tokens=int(job.n_tokens().sum()), unit=job.length_unit,
        sources=", ".join(sorted({str(s) for s in job.pool.sources()})),
        model="none" if job.text_only else job.recipe.model.model_name_or_path,
    )  # fmt: skip
    write_atomic(job.run.path / layout.CARD, text.encode())
