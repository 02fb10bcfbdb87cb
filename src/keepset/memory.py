"""Memory: what nobody holds any more is given back, and a batch that doesn't fit is computed in halves.

No row is ever skipped. Batches of other shape change scores by rounding only (relative 1e-6 in float32), and each
halving is counted, logged and written to the stage's entry in `costs.jsonl` (`halved_batches`).
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable

import numpy as np

from keepset.stopping import out_of_memory

log = logging.getLogger(__name__)


class Count:
    """How many batches this process has halved."""

    total = 0


def in_halves(indices: np.ndarray, compute: Callable[[np.ndarray], None]) -> None:
    """Call `compute(indices)`; where memory runs out, on halves, in order.

    `compute` stores its own result; a call that failed must leave nothing behind that a later call doesn't replace.

    Raises:
        MemoryError, RuntimeError: one row alone doesn't fit; as it was raised.
    """
    try:
        compute(indices)
        return
    except Exception as error:
        if not out_of_memory(error) or len(indices) < 2:
            raise
    # out of the except block: the traceback, which holds the failed batch's tensors, is gone
    free_memory()
    Count.total += 1
    log.warning("out of memory: a batch of %d rows is halved; a lower batching.token_budget is quicker", len(indices))
    middle = len(indices) // 2
    in_halves(indices[:middle], compute)
    in_halves(indices[middle:], compute)


def free_memory() -> None:
    """Give back what nobody holds any more: trainers and their models are cycles, which wait for the collector."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()
