"""Keys of a recipe by their dotted names: `train.learning_rate`, `pool.0.limit`."""

from __future__ import annotations

from typing import Any

from keepset.errors import RecipeError

SHORT = {"pool": "path", "target": "path", "methods": "name"}
"""Lists of sections that a text may stand for, and the key whose value it is then."""
GONE = {"batching.keep_token_losses": (False, "`keepset explain ROW --tokens` runs the models")}
"""Keys that earlier versions knew: the value that did nothing, and what there is now."""


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings; a number is a place in a list (`pool.0.limit`), short forms included.

    Raises:
        RecipeError: the key leads through something that holds no keys.
    """
    *parents, last = key.split(".")
    inner: Any = data
    if len(path := [*parents, last]) > 1 and path[1].isdecimal() and path[0] in SHORT and path[0] in data:
        short, given = SHORT[path[0]], data[path[0]]
        given = given if isinstance(given, list) else [given]
        data[path[0]] = [{short: one} if isinstance(one, str) and len(path) > 2 else one for one in given]
    for name in parents:
        if isinstance(inner, list):
            inner = inner[_place(inner, name, key)]
        else:
            if inner.get(name) is None:  # a section that may be left out
                inner[name] = {}
            inner = inner[name]
        if not isinstance(inner, dict | list):
            raise RecipeError(f"key '{key}': '{name}' holds no keys")
    if isinstance(inner, list):
        inner[_place(inner, last, key)] = value
    else:
        inner[last] = value


def _place(inner: list[Any], name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(inner):
        raise RecipeError(f"key '{key}': '{name}' must be a place in the list, from 0 to {len(inner) - 1}")
    return int(name)


def without_gone(data: dict[str, Any], where: str, stored: bool) -> dict[str, Any]:
    """A recipe without the keys of earlier versions that say nothing.

    Raises:
        RecipeError: one that says something, in a recipe that isn't a stored one.
    """
    for place, (nothing, now) in GONE.items():
        section, key = place.split(".")
        if not isinstance(data.get(section), dict) or key not in data[section]:
            continue
        if data[section][key] != nothing and not stored:
            raise RecipeError(f"{where}: {place} is gone: {now}; remove it")
        data = {**data, section: {k: v for k, v in data[section].items() if k != key}}
    return data


def diff_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Say in words where two nested mappings differ: `budget: 5% -> 10%`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}, key=str):
            found += diff_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [f"{prefix}: {old} -> {new}"]
