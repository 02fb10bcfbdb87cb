"""Run by benchmarks/text.py with the interpreter that has the `data-selection` package: POOL TARGET OUT PROCESSES.

Reads and scores the pool with the package's own calls, saves the log weights in the pool's order, prints seconds.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_selection import HashedNgramDSIR

pool, target, out, processes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with tempfile.TemporaryDirectory() as cache:
    start = time.perf_counter()
    dsir = HashedNgramDSIR([pool], [target], cache_dir=cache, num_proc=processes, min_example_length=0)
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    dsir.compute_importance_weights()
    seconds = time.perf_counter() - start
    parts = [np.load(Path(cache) / "log_importance_weights" / f"{i}.npy") for i in range(processes)]
    weights = np.empty(sum(map(len, parts)))
    for i, part in enumerate(parts):  # its shards are every processes-th line
        weights[i::processes] = part
np.save(out, weights)
print(json.dumps({"seconds": seconds}))
