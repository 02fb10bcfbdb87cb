"""One training over several processes of this machine, started by torchrun: `num_processes` of a recipe's section.

The rows and the arguments go to the processes as files beside the result; each process (`keepset.train.launched`) calls
`fit` again.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from keepset.errors import ModelError
from keepset.model.encode import Encoded
from keepset.recipe import TrainSpec
from keepset.runfolder.execute import DIE_WITH_PARENT
from keepset.runfolder.files import write_atomic
from keepset.train.training import WORK

if TYPE_CHECKING:
    from keepset.train.training import Training

    Sides = tuple[Encoded, ...]

LAUNCHED = "KEEPSET_LAUNCHED"
"""Is set in the environment of processes that this module started."""


def launch(training: Training, sides: Sequence[Sides], out: Path) -> None:
    """Train in several processes; returns when all have ended well.

    Raises:
        ModelError: one of them failed; with the last line that it wrote.
    """
    folder = out / f"{WORK}.launched"
    write_job(training, sides, folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(training.args.num_processes), "-m", "keepset.train.launched", str(folder), str(out)]  # fmt: skip
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, LAUNCHED: "1", **threads}, preexec_fn=die_with_parent
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun ends its processes then
            process.wait(60)
            raise
    if code:
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if "Error" in line and "ChildFailedError" not in line] or lines or ["nothing"]
        raise ModelError(f"{out.name}: one of {training.args.num_processes} processes failed: {said[-1][-300:]}")
    shutil.rmtree(folder)


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)


def write_job(training: Training, sides: Sequence[Sides], folder: Path) -> None:
    """Write what the processes need: `job.json`, and the rows' tokens one after the other in `rows.safetensors`."""
    flat = [side for row in sides for side in row]
    arrays = {
        "input_ids": np.concatenate([np.asarray(s.input_ids, np.int32) for s in flat]),
        "supervised": np.concatenate([np.asarray(s.supervised, bool) for s in flat]),
        "truncated": np.array([s.truncated for s in flat]),
        "ends": np.cumsum([len(s.input_ids) for s in flat]),
        "sides": np.array([len(row) for row in sides]),
    }
    write_atomic(folder / "rows.safetensors", save(arrays))
    job = {
        "model": training.model.model_dump(mode="json"), "lora": training.lora.model_dump(mode="json"),
        "args": training.args.model_dump(mode="json", include=set(TrainSpec.model_fields)),
        "seed": training.seed, "moments": training.moments,
    }  # fmt: skip
    write_atomic(folder / "job.json", json.dumps(job).encode())


def read_rows(arrays: dict[str, np.ndarray]) -> list[Sides]:
    """The rows of `write_job`."""
    starts = [0, *arrays["ends"].tolist()]
    flat = [
        Encoded(arrays["input_ids"][a:b], arrays["supervised"][a:b], bool(cut))
        for a, b, cut in zip(starts, starts[1:], arrays["truncated"], strict=False)
    ]
    places = [0, *np.cumsum(arrays["sides"]).tolist()]
    return [tuple(flat[a:b]) for a, b in zip(places, places[1:], strict=False)]
