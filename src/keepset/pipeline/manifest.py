"""`manifest.json`: what a run is made of and made, with versions and checksums, so that it can be made again."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from keepset import __version__
from keepset.pipeline.choose import stored_subsets
from keepset.runfolder import layout
from keepset.runfolder.files import file_digest
from keepset.stages.job import Job

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python, keepset and what it stands on."""
    version_of = {"python": platform.python_version(), "keepset": __version__}
    for name in PACKAGES:
        try:
            version_of[name] = version(name)
        except PackageNotFoundError:
            continue
    return version_of


def write_manifest(job: Job, seconds: float) -> None:
    """Write the manifest of a run that took so many seconds; everything else is written before."""
    manifest: dict[str, Any] = {
        "recipe": job.recipe.model_dump(mode="json", exclude={"run_dir"}),
        "versions": versions(),
        "model": None if job.text_only else {"fingerprint": job.fingerprint, "encoder": job.encoder.fingerprint},
        "pool": {
            "rows_in": len(job.pool) + len(job.pool.quarantine),
            "usable": len(job.ids),
            "quarantined": len(job.pool) + len(job.pool.quarantine) - len(job.ids),
            "duplicates": job.pool.duplicates,
            "fingerprint": job.pool.fingerprint(),
        },
        "files": made_files(job),
        "subsets": job.run.load_json(layout.SUBSETS, {}),
        "costs": job.run.costs(),
        "selection_cost": job.run.load_json(layout.COMPARISON, {}).get("selection"),
        "seconds": round(seconds, 1),
    }
    job.run.save_json(layout.MANIFEST, manifest)


def made_files(job: Job) -> dict[str, str]:
    """sha256 of what the run made and would make again: scores, subsets, weights, per-item results; by file name."""
    run = job.run
    files = {layout.scores(p.stem): file_digest(p) for p in sorted(run.path.glob(layout.scores("*")))}
    files |= {subset.file: subset.sha256 for subset in stored_subsets(run).values()}
    for done in sorted(p for kind in layout.STEP_FOLDERS for p in run.path.glob(f"{kind}/*/{layout.DONE}")):
        folder = str(done.parent.relative_to(run.path))
        made = (run.done(folder) or {"files": {}})["files"]
        kept = (".safetensors", layout.POINTS)  # others hold seconds
        files |= {f"{folder}/{name}": sha for name, sha in sorted(made.items()) if name.endswith(kept)}
    return files
