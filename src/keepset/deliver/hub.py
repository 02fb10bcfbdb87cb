"""`keepset push`: a run's chosen rows, all its scores and its card to a dataset repository of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from keepset.errors import KeepsetError, first_line
from keepset.runfolder import layout
from keepset.runfolder.run import Run


def push_to_hub(run_dir: Path, repo_id: str, *, private: bool = True) -> str:
    """Push the rows as the configuration `default`, the first method's scores as `scores`, the card and the manifest.

    The card goes first: `datasets` then writes the configurations into its header. Paths of this machine are cut to
    file names in the manifest; the quarantine (it quotes rows that were refused) stays here.

    `private` is what a repository made by this call is; one that exists stays as it is. Returns the repository's
    address.

    Raises:
        KeepsetError: the run isn't finished, the name isn't one, the hub is switched off, can't be reached or refuses.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo_id):
        raise KeepsetError(f"'{repo_id}': name the repository as user/name")
    run = Run(run_dir)
    lacking = [name for name in (layout.CARD, layout.ROWS, layout.MANIFEST) if not (run_dir / name).exists()]
    if lacking:
        raise KeepsetError(f"{run_dir}: no {lacking[0]}; finish the run with `keepset run`, then push it")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        raise KeepsetError("HF_HUB_OFFLINE is set: nothing is sent; unset it to push")
    try:
        from datasets import Dataset
        from huggingface_hub import DatasetCard, HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise KeepsetError("pushing needs datasets: pip install 'keepset[train]'") from None
    for name in (layout.ROWS, layout.MANIFEST):
        run.check(name)
    card = DatasetCard((run_dir / layout.CARD).read_text(encoding="utf-8"))
    header: Any = card.data
    scores = next(c["data_files"] for c in header.configs if c["config_name"] == "scores")
    header.configs = None  # datasets writes them for the files it uploads
    api = HfApi()
    try:
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        card.push_to_hub(repo_id, repo_type="dataset")
        Dataset.from_parquet(str(run_dir / layout.ROWS), keep_in_memory=True).push_to_hub(repo_id, private=private)
        Dataset.from_parquet(str(run_dir / scores), keep_in_memory=True).push_to_hub(
            repo_id, config_name="scores", private=private
        )
        manifest = public(run.load_json(layout.MANIFEST))
        api.upload_file(
            path_or_fileobj=(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(),
            path_in_repo=layout.MANIFEST,
            repo_id=repo_id,
            repo_type="dataset",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = first_line(error)
        raise KeepsetError(f"{repo_id}: the hub refused or could not be reached: {first[:200]}") from None
    return str(address)


def public(value: Any) -> Any:
    """A manifest's value with absolute paths cut to their last name."""
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [public(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
