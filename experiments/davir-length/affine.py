"""Does the loss drop have a larger part than the base loss that does not grow with the answer? docs/theory.md, 5.3.

    python experiments/davir-length/affine.py runs/davir-length/alpaca runs/davir-length/dolly ...

Fits drop = c0 + c1·T and base loss = l0 + l1·T (nats, T answer tokens) by least squares over a run's rows, with 95 %
bootstrap intervals of c0/c1 − l0/l1 (positive: DavIR falls with length), and writes `results/affine.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from keepset.runfolder.run import Run


def main() -> None:
    results = {}
    for folder in sys.argv[1:]:
        columns = Run(folder).load_table("scores/davir.parquet").to_pydict()
        n, ini, ref = (np.array(columns[k], dtype=np.float64) for k in ("n_tokens", "loss_ini", "loss_ref"))

        def fit(rows: np.ndarray, n: np.ndarray = n, ini: np.ndarray = ini, ref: np.ndarray = ref) -> np.ndarray:
            (c1, c0), (l1, l0) = (np.polyfit(n[rows], y[rows], 1) for y in (ini - ref, ini))
            return np.array([c0, c1, l0, l1, c0 / c1 - l0 / l1])

        rng = np.random.default_rng(0)
        draws = np.array([fit(rng.integers(0, len(n), len(n))) for _ in range(2000)])
        names = ("c0", "c1", "l0", "l1", "gap")
        found = {k: round(float(v), 4) for k, v in zip(names, fit(np.arange(len(n))), strict=True)}
        low, high = np.percentile(draws[:, 4], [2.5, 97.5])
        results[Path(folder).name] = {
            "rows": len(n),
            **found,
            "gap_low": round(float(low), 2),
            "gap_high": round(float(high), 2),
        }
        print(Path(folder).name, results[Path(folder).name])
    out = Path(__file__).parent / "results" / "affine.json"
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
