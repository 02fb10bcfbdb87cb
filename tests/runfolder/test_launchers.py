"""Where among its fellows a worker begins, and which GPU it takes."""

from __future__ import annotations

import os

import pytest

from keepset.runfolder.launchers import GROUP, place_among, stand_alone

LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN",
             "SLURM_PROCID", "SLURM_NTASKS", "JOB_COMPLETION_INDEX")  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, 0.0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 0.75),
        ({"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10"}, 0.25),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 0.5),
        ({"RANK": "x", "WORLD_SIZE": "4"}, 0.0),
        ({"RANK": "9", "WORLD_SIZE": "0"}, 0.0),
    ],
)
def test_where_a_worker_begins(environment, place, monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_among() == place


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [
        ({"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "6"),
        ({"LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "5"),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "3"}, "3"),  # Slurm gave it one already
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "0,1"),
    ],
)
def test_a_worker_has_a_gpu_of_its_own_and_is_in_no_group(environment, gpu, monkeypatch):
    for name in (*GROUP, "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x", **environment}.items():
        monkeypatch.setenv(name, value)
    stand_alone()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu and not set(GROUP) & set(os.environ)
