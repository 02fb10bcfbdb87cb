"""The job in order: score, choose, learn, compare, findings, manifest."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepset.deliver.finish import run_recipe as run_recipe


def __getattr__(name: str) -> Any:
    """Load `run_recipe`, which imports every stage, when it is first asked for; it is what users import from here."""
    if name != "run_recipe":
        raise AttributeError(f"module 'keepset.pipeline' has no attribute '{name}'")
    from keepset.deliver.finish import run_recipe

    return run_recipe
