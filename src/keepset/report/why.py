"""`keepset report --why`: what only the models can say about the kept rows, stored once so that the page can show it.

For DavIR and its kin the loss of every token before and after; for ROSE, LESS and grad-cosine the validation rows that
pulled most. Both cost a pass over the kept rows, a few percent of what choosing them cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from keepset.errors import KeepsetError
from keepset.report.explain_pairs import COSINES, pair_pulls, tell_without
from keepset.report.explain_tokens import tokens_of_rows
from keepset.report.read import read_run
from keepset.runfolder import layout
from keepset.runfolder.run import Run

EACH = 3  # validation rows kept for each direction
ROWS = 2_000  # most rows a method


def write_why(run_dir: Path, *, console: Console | None = None) -> Path:
    """Explain every kept row of every method that a model can explain, into `why.json`.

    Args:
        run_dir: a run folder with its models.
        console: where progress goes.

    Raises:
        KeepsetError: no method here has anything to say, or what it needs is gone.
    """
    data = read_run(Path(run_dir))
    say = (console or Console(stderr=True)).print
    found: dict[str, dict[str, Any]] = {}
    for label, columns in data.columns.items():
        kept = [str(i) for i in data.ids[columns["selected"] > 0] if str(i) in data.messages][:ROWS]
        if not kept:
            continue
        if {"loss_ini", "loss_ref"} <= set(columns):
            say(f"{label}: the tokens of {len(kept)} kept rows, before and after", highlight=False)
            told = tokens_of_rows(run_dir, kept)
            found[label] = {
                id_: {"tokens": [[t["text"], round(t["before"], 3), round(t["after"], 3)] for t in facts["tokens"]]}
                for id_, facts in told.items()
            }
        elif data.method_names.get(label) in COSINES:
            say(f"{label}: the validation rows behind {len(kept)} kept rows", highlight=False)
            found[label] = {id_: strongest(facts) for id_, facts in pair_pulls(run_dir, kept, label).items()}
    if not found:
        raise KeepsetError(f"{run_dir}: no method here keeps rows that a model explains (davir, rose, less and kin)")
    return Run(Path(run_dir)).save_json(layout.WHY, found)


def strongest(facts: dict[str, Any]) -> dict[str, Any]:
    """The ends of a row's list of validation rows, and the sentence about doing without them."""
    pairs = facts["pairs"]
    ends = pairs if len(pairs) <= 2 * EACH else [*pairs[:EACH], *pairs[-EACH:]]
    short = [{**p, "value": round(p["value"], 4), "checkpoints": [round(v, 4) for v in p["checkpoints"]]} for p in ends]
    return {"pairs": short, "left_out": len(pairs) - len(ends), "weights": [round(w, 4) for w in facts["weights"]],
            "without": tell_without(facts["without"])}  # fmt: skip
