"""The demo's data: a small noisy pool, a preference target and held-out pairs, written for this project.

`pool.jsonl` (Alpaca dialect) holds six tasks; `quality` says what each row really is (good, wrong, truncated,
duplicate, offtask) and no method reads it. `target.jsonl` and `eval.jsonl` hold chosen/rejected pairs of two of the six
tasks, so the truth is planted: good rows of those two tasks are the ones a targeted method should find. `recipe.yaml`
runs it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
