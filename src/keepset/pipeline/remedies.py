"""Findings as a reader takes them up: the gravest kinds first, each with one command that does something about it.

The commands are whole and real: a test puts each of them through the command line's own parser. What trains more than
before goes on in the same run folder (`--force`: what still fits is kept); what changes a score gets a folder or a
label of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepset.recipe import Recipe
from keepset.runfolder import layout
from keepset.runfolder.records import Finding


@dataclass(frozen=True)
class Remedy:
    """What a kind of finding is called in plain words, and the command against it, given the finding and the run."""

    title: str
    words: Callable[[Finding, Path, Recipe], Sequence[str]]


def again(folder: Path, *settings: str, named: str = "") -> list[str]:
    """The run once more with other settings: in the same folder, or beside it under `<folder>-<named>`."""
    place = f"{folder}-{named}" if named else str(folder)
    new = [word for setting in settings for word in ("--set", setting)]
    go_on = [] if named else ["--force"]
    return ["keepset", "run", str(folder / layout.RECIPE), "--run_dir", place, *go_on, *new]


def chosen(finding: Finding, folder: Path, *options: str) -> list[str]:
    """The choice of the finding's method once more."""
    return ["keepset", "select", label_of(finding), "--run_dir", str(folder), *options]


def label_of(finding: Finding) -> str:
    """The scored label that a finding is about; findings of one budget name it `label@budget`."""
    return finding.method.split("@")[0]


def looked_into(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """The pool beside the target and the held-out pairs, with what stands in both."""
    words = ["keepset", "inspect", recipe.pool[0].path]
    words += [word for spec in recipe.target for word in ("--target", spec.path)]
    return words + [word for spec in recipe.evaluate.pairs for word in ("--pairs", spec.path)]


def held_against(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """The control for the direction in which a score follows length; with both there, the comparison."""
    grows = (finding.figure or 0.0) > 0
    if recipe.controls.longest if grows else recipe.controls.shortest:
        return ["keepset", "compare", "--run_dir", str(folder), "--more"]
    return again(folder, "controls.longest=true" if grows else "controls.shortest=true")


def more_seeds(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """Two training seeds more, and as many draws of Random."""
    seeds, draws = recipe.train_seeds, recipe.controls.random_seeds
    grown = [[*had, *range(max(had, default=-1) + 1, max(had, default=-1) + 3)] for had in (seeds, draws)]
    return again(folder, f"train_seeds={grown[0]}", f"controls.random_seeds={grown[1]}")


def without_momentum(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """The method with the map that leaves the shared term out, under a label of its own."""
    label = label_of(finding)
    spec = next((m for m in recipe.methods if m.label == label), None)
    options = {**(spec.options if spec else {}), "map": "precondition"}
    words = ["keepset", "score", spec.name if spec else label, "--run_dir", str(folder)]
    return [*words, "--label", f"{label}-precondition", *(w for k, v in options.items() for w in ("-o", f"{k}={v}"))]


def longer_reference(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """Twice the epochs of the reference."""
    epochs = 2 * recipe.reference.num_train_epochs
    return again(folder, f"reference.num_train_epochs={epochs:g}", named="longer")


def budget_in_tokens(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """The first budget as a share of the pool's tokens, so that long answers count for more."""
    first = str(recipe.budget[0])
    return chosen(finding, folder, "--budget", f"{first} tokens" if first.endswith("%") else "10% tokens")


def first_in_doubt(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """One of the rows in doubt, whose ids end the finding's text."""
    row = finding.text.rpartition(": ")[2].split(",")[0]
    return ["keepset", "explain", row, "--label", label_of(finding), "--run_dir", str(folder)]


def cross_fitted(finding: Finding, folder: Path, recipe: Recipe) -> list[str]:
    """References that score only rows that they were not trained on."""
    return again(folder, "reference.folds=5", named="folds")


REMEDIES = {
    "evaluation-in-pool": Remedy("Held-out pairs stand in the pool", looked_into),
    "target-in-pool": Remedy("Rows of the target stand in the pool", looked_into),
    "mixed-machines": Remedy("Scores come from unlike machines", lambda f, d, r: again(d, named="one-machine")),
    "constant-scores": Remedy("Every row has the same score", looked_into),
    "worse-than-random": Remedy(
        "Random rows do better",
        lambda f, d, r: ["keepset", "export", random_subset(f, r), "random.jsonl", "--run_dir", str(d)],
    ),
    "reference-held-out": Remedy("The reference may have learnt its rows by heart", cross_fitted),
    "reference-gain": Remedy("The reference learnt nothing", longer_reference),
    "scores-near-zero": Remedy("The reference hardly differs from the base", longer_reference),
    "category-shares": Remedy("Whole categories are gone",
        lambda f, d, r: chosen(f, d, "--quota", "floor", "--quota_by", "category")),
    "source-shares": Remedy("Whole sources are gone",
        lambda f, d, r: chosen(f, d, "--quota", "floor", "--quota_by", "source")),
    "length-correlation": Remedy("The score follows length", held_against),
    "kept-length": Remedy("The choice is largely one of length", budget_in_tokens),
    "duplicates": Remedy("Copies among the rows", lambda f, d, r: chosen(f, d, "--dedup", "exact")),
    "shared-momentum": Remedy("What all rows share outweighs each row's own part", without_momentum),
    "store-agreement": Remedy("Stored gradients rank rows otherwise than exact ones",
        lambda f, d, r: again(d, "gradients.store=null", named="exact")),
    "base-loss-near-zero": Remedy("Some rows are known already",
        lambda f, d, r: ["keepset", "plot", "--run_dir", str(d), "--only", "losses"]),
    "no-better-than-random": Remedy("Not told apart from random rows", more_seeds),
    "stability": Remedy("Some rows are in or out by rounding alone", first_in_doubt),
}  # fmt: skip
"""Every kind of warning, the gravest first."""


def random_subset(finding: Finding, recipe: Recipe) -> str:
    """The first random choice of the finding's size."""
    _, several, budget = finding.method.partition("@")
    return f"random-{next(iter(recipe.controls.random_seeds), 0)}{several}{budget}"


@dataclass(frozen=True)
class Kind:
    """Findings of one name and level, in the order of the file; `command` is "" where there is none."""

    name: str
    level: str
    title: str
    findings: tuple[Finding, ...]
    advice: str
    command: str


def kinds(findings: Sequence[Finding], folder: Path, recipe: Recipe | None) -> list[Kind]:
    """Findings by kind: warnings before notes, the gravest first; a kind that the recipe has dealt with is a note."""
    dedup = recipe.select.dedup if recipe else "none"
    grouped: dict[tuple[bool, str], list[Finding]] = {}
    for finding in findings:
        note = finding.level != "warning" or (finding.name == "duplicates" and dedup != "none")
        grouped.setdefault((note, finding.name), []).append(finding)
    graveness = list(REMEDIES)
    order = sorted(grouped, key=lambda k: (k[0], graveness.index(k[1]) if k[1] in REMEDIES else len(graveness)))
    made = []
    for note, name in order:
        several, remedy = tuple(grouped[note, name]), REMEDIES.get(name)
        title, command, advice = name.replace("-", " ").capitalize(), "", several[0].advice
        if note and several[0].level == "warning":
            advice = f"the choice took them out: select.dedup is {dedup}"
        elif not note and remedy is not None:
            title = remedy.title
            command = shlex.join(remedy.words(several[0], folder, recipe)) if recipe else ""
        made.append(Kind(name, "info" if note else "warning", title, several, advice, command))
    return made
