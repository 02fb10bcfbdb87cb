"""`keepset doctor`: what this machine and environment are, in a block that can be pasted into a bug report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from keepset.errors import KeepsetError
from keepset.pipeline.manifest import versions
from keepset.recipe import ModelSpec


def examine(model_name_or_path: str | None = None) -> dict[str, Any]:
    """Collect versions, device, memory, disk and offline state; with a model, whether it and its template load.

    Returns:
        JSON-ready facts. `problems` lists what is wrong, in words, and `notes` what isn't there and needn't be.
    """
    facts: dict[str, Any] = {"versions": versions(), "problems": [], "notes": []}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts["cores"], facts["memory_gib"] = os.cpu_count(), round(memory / 2**30, 1)
    facts["disk_free_gib"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    facts["offline"] = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0", "false", "False")
    try:
        import torch

        facts["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        facts["threads"] = torch.get_num_threads()
    except ImportError:
        facts["device"] = None
        facts["notes"].append("without torch: the text methods work; for the others pip install 'keepset[train]'")
        if model_name_or_path:
            facts["problems"].append(f"{model_name_or_path}: torch is not installed; pip install 'keepset[train]'")
    if model_name_or_path and facts["device"]:
        facts["model"] = examine_model(model_name_or_path, facts["problems"])
    return facts


def examine_model(name: str, problems: list[str]) -> dict[str, Any]:
    """Load a model and encode one row."""
    from keepset.model.encode import RowRefused
    from keepset.model.load import load

    try:
        loaded = load(ModelSpec(model_name_or_path=name))
        row = loaded.encoder.encode([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    except (KeepsetError, RowRefused) as error:
        problems.append(str(error))
        return {"name": name, "loads": False}
    return {
        "name": name,
        "loads": True,
        "architecture": loaded.model.config.model_type,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "tokens": len(row.input_ids),
        "supervised": int(row.supervised.sum()),
        "fingerprint": loaded.fingerprint,
    }


def print_examination(facts: dict[str, Any], console: Console) -> None:
    """Print the block."""
    for name, value in facts["versions"].items():
        console.print(f"{name:14s} {value}", highlight=False)
    for name in ("device", "cores", "memory_gib", "disk_free_gib", "offline"):
        console.print(f"{name:14s} {facts[name]}", highlight=False)
    for name, value in facts.get("model", {}).items():
        console.print(f"model {name:14s} {value}", highlight=False, markup=False, soft_wrap=True)
    for note in facts["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for problem in facts["problems"]:
        console.print(f"problem: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
