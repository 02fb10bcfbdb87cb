"""The report: one self-contained HTML page made from a run folder alone. No torch, no model, no outside request."""

from __future__ import annotations

from pathlib import Path

from keepset.report.page import render
from keepset.report.payload import build_payload
from keepset.report.read import read_run
from keepset.runfolder import layout
from keepset.runfolder.files import write_atomic

__all__ = ["write_report"]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write `report.html` from whatever the run folder holds so far.

    What is missing in the folder leaves its section out. Returns the path written.

    Raises:
        KeepsetError: `run_dir` holds no scores, or a file of it is damaged.
    """
    path = Path(out) if out is not None else Path(run_dir) / layout.REPORT
    html = render(build_payload(read_run(Path(run_dir))))
    write_atomic(path, html.encode("utf-8"))
    return path
