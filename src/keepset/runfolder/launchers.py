"""What launchers (Slurm, torchrun, Kubernetes) tell a worker in its environment; what must not reach its trainer."""

from __future__ import annotations

import os
from pathlib import Path

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""By these accelerate takes a process for one of a group that trains together, and waits for the others."""


def place_among() -> float:
    """Where among its fellows this process stands, from 0 to below 1, as launchers say it; 0 where none does.

    Nothing depends on it but the order in which shards are looked at, so a wrong one does no harm.
    """
    for rank, size, first in (
        ("RANK", "WORLD_SIZE", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", ""),
        ("JOB_COMPLETION_INDEX", "WORLD_SIZE", ""),
    ):
        try:
            number, of = int(os.environ[rank]), int(os.environ[size])
            start = int(os.environ.get(first) or 0) if first else 0
        except (KeyError, ValueError):
            continue
        if of > 0:
            return ((number - start) % of) / of
    return 0.0


def stand_alone() -> None:
    """Make this process one by itself: with one GPU of the machine, of its own, and outside any process group."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = visible or [str(k) for k in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    if local.isdecimal() and len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(local) % len(devices)]
    for name in GROUP:
        os.environ.pop(name, None)
