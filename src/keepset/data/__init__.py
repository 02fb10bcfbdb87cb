"""Data in and out: pools and targets from any common dialect and container, and subsets in the same form again."""

from keepset.data.pool import Message, Pool, load_pool
from keepset.data.reasons import REASONS, FileRefused, Quarantined
from keepset.data.target import Target, load_target

__all__ = ["REASONS", "FileRefused", "Message", "Pool", "Quarantined", "Target", "load_pool", "load_target"]
