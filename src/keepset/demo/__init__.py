"""The demo's data: a small pool, a preference target and held-out pairs, written for this project.

`pool.jsonl` (Alpaca dialect) holds seven tasks; `quality` says what each row really is (good, wrong, truncated,
duplicate, offtask) and no method reads it. `target.jsonl` and `eval.jsonl` hold chosen/rejected pairs of two tasks: ISO
dates (rejected: day and month swapped) and replies to customers (rejected: rude). In the pool most answers to these two
are wrong in the same way, so the truth is planted: the 26 good ones, about the budget, are what a targeted method
should find. `recipe.yaml` runs it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
