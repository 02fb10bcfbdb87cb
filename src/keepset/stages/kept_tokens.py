"""Token losses on disk (`batching.keep_token_losses`): what explanations read instead of running the models again.

One Parquet file a shard in `work/<stage>/<key>/tokens/`, beside the shard of summed losses: `id` and `nll`, a list of
nats (float32), one for each supervised token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keepset.runfolder import layout
from keepset.runfolder.files import digest, write_atomic
from keepset.runfolder.run import Run


def keep_tokens(folder: Path, ids: Sequence[str], token_nll: Sequence[np.ndarray]) -> None:
    """Write the token losses of some rows; the same rows write the same file again."""
    nll = pa.array([x.astype(np.float32) for x in token_nll], pa.list_(pa.float32()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": pa.array(list(ids)), "nll": nll}), sink, compression="zstd")
    write_atomic(folder / layout.TOKENS_FOLDER / f"{digest(list(ids))[:16]}.parquet", sink.getvalue().to_pybytes())


def kept_tokens(run: Run, stage: str, row_id: str) -> np.ndarray | None:
    """A row's cross-entropies (nats, float32) under a stage's model; None if not kept, or kept under several models.

    Args:
        run: the run folder.
        stage: `losses-base`, `losses-reference` or `losses-fold<k>`.
        row_id: the row.
    """
    found = []
    for path in sorted((run.path / layout.WORK_FOLDER / stage).glob(f"*/{layout.TOKENS_FOLDER}/*.parquet")):
        try:
            key = json.loads((path.parents[1] / layout.KEY).read_text(encoding="utf-8"))
            if key["token_loss"] != "ce":  # of a method with another loss
                continue
            table = pq.read_table(path, filters=[("id", "=", row_id)])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # damaged: the models can be run again
            continue
        found += [np.array(x, dtype=np.float32) for x in table["nll"].to_pylist()]
    return found[0] if len(found) == 1 else None
