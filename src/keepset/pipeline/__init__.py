"""The job in order: score, choose, learn, compare, findings."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Load `run_recipe` when it is first asked for: it imports every stage."""
    if name != "run_recipe":
        raise AttributeError(f"module 'keepset.pipeline.run' has no attribute '{name}'")
    from keepset.pipeline.run import run_recipe

    return run_recipe
