"""keepset: choose post-training data for language models.

Public names load when first used, so that `import keepset` is quick and needs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_pool": "keepset.data",
    "load_target": "keepset.data",
    "write_subset": "keepset.data.export",
    "load_recipe": "keepset.recipe",
    "parse_recipe": "keepset.recipe",
    "run_recipe": "keepset.pipeline",
    "METHODS": "keepset.methods.table",
    "select": "keepset.selection.select",
    "write_report": "keepset.report",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'keepset' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
