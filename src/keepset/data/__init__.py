"""Data in and out: pools and targets from any common dialect and container, and subsets in the same form again."""

from keepset.data.export import write_subset
from keepset.data.export_dialects import row_texts
from keepset.data.export_parquet import rows_table, write_parquet
from keepset.data.leakage import find_leaks
from keepset.data.pool import Message, Pool, load_pool
from keepset.data.reasons import REASONS, FileRefused, Quarantined
from keepset.data.target import Target, load_target

__all__ = [
    "REASONS",
    "FileRefused",
    "Message",
    "Pool",
    "Quarantined",
    "Target",
    "find_leaks",
    "load_pool",
    "load_target",
    "row_texts",
    "rows_table",
    "write_parquet",
    "write_subset",
]
