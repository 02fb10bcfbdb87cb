"""One of the processes that `keepset.train.launch` starts: `python -m keepset.train.launched FOLDER OUT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.fit import fit
from keepset.train.launch import die_with_parent, read_rows


def main(folder: Path, out: Path) -> None:
    """Take part in the training that `folder` describes; its result goes to `out`."""
    die_with_parent()
    if torch.cuda.is_available():  # the model is loaded there, too
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    job: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    fit(
        ModelSpec(**job["model"]), LoraSpec(**job["lora"]), read_rows(load_file(folder / "rows.safetensors")), out,
        TrainSpec(**job["args"]), seed=job["seed"], moments=job["moments"],
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
