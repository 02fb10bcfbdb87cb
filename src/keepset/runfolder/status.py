"""How far a run is, from what its folder holds, without a lock and without writing: `keepset status`, the live view.

The marks of work are files: scores, finished evaluations, the comparison. What is under way stands in
`work/costs-open.json`, which the process that leads renews every few seconds. Who leads is read from the kernel's list
of locks (Linux); elsewhere, and on other machines of a shared folder, the age of that file and of the workers' claims
says whether somebody is there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from keepset.errors import KeepsetError
from keepset.progress import clock
from keepset.runfolder import layout
from keepset.runfolder.claims import BEATS, PATIENCE, generation
from keepset.runfolder.costs import BEAT, Meter, sound

LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Worker:
    """A process at the folder: where, its pid (0: not seen from here), what it has claimed, and whether it lives."""

    host: str
    pid: int
    claims: tuple[str, ...]
    alive: bool


@dataclass(frozen=True)
class Spent:
    """Seconds as logged and operations by count; stages that enclose others are counted once."""

    seconds: float
    flops: float

    def __str__(self) -> str:
        return clock(self.seconds) + (f", {self.flops / 1e12:.3g} TFLOP" if self.flops >= 1e10 else "")


@dataclass(frozen=True)
class Status:
    """What a run folder says of its run.

    Attributes:
        state: running, stopped (in the middle of a stage), unfinished (between two), or finished.
        done: steps that are done.
        now: stages under way, the innermost last, as `costs-open.json` has them; of a stopped run, where it stopped.
        next: steps that are not done, without the one that is under way.
        workers: who is at it.
        spent: so far.
        planned: by the last `keepset plan` of this folder; None without one.
        finding: the last warning.
    """

    state: str
    done: tuple[str, ...]
    now: tuple[dict[str, Any], ...]
    next: tuple[str, ...]
    workers: tuple[Worker, ...]
    spent: Spent
    planned: Spent | None
    finding: str

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def status(folder: Path) -> Status:
    """Read a run folder.

    Raises:
        KeepsetError: it is none.
    """
    try:
        recipe = yaml.safe_load((folder / layout.RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        raise KeepsetError(f"{folder} is no run folder (it has no recipe.yaml); start with `keepset run` or `score`")
    done, left = steps(folder, recipe)
    now = [entry for entry in as_list(read(folder / layout.OPEN_COSTS)) if sound(entry)]
    workers = [*leader(folder), *claimants(folder / layout.CLAIMS_FOLDER)]
    here = any(worker.alive for worker in workers) or (bool(now) and age(folder / layout.OPEN_COSTS) < 3 * BEAT)
    state = "running" if here else "stopped" if now else "unfinished" if left else "finished"
    return Status(
        state, tuple(done), tuple(now), tuple(left[1:] if state == "running" else left), tuple(workers),
        spent(folder, now), planned(folder), last_finding(folder),
    )  # fmt: skip


def outlook(folder: Path, recipe: Mapping[str, Any]) -> str:
    """What stands at the beginning of a stage: how many steps are done, which are next, what was spent."""
    done, left = steps(folder, recipe)
    after = f"; next: {left[1]}" if len(left) > 1 else ""
    plan = planned(folder)
    return f"{len(done)} of {len(done) + len(left)} steps done{after}; {spent(folder, [])}" + (
        f" of about {plan} planned" if plan else " so far"
    )


# -- steps ------------------------------------------------------------------------------------------------------------


def steps(folder: Path, recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The steps of `keepset run` that are done and those that are left: scores, models, the comparison."""
    marks = [(f"score {label}", folder / layout.scores(label)) for label in scored_labels(recipe)]
    marks += [(f"train and evaluate {name}, seed {seed}", folder / layout.done(layout.evaluation(name, seed)))
              for name, seed in models(recipe)]  # fmt: skip
    done = [name for name, mark in marks if mark.exists()]
    left = [name for name, mark in marks if not mark.exists()]
    (left if left or not (folder / layout.COMPARISON).exists() else done).append("compare and report")
    return done, left


def labels(recipe: Mapping[str, Any], key: str) -> list[str]:
    """The labels of the recipe's methods or mixes."""
    return [m if isinstance(m, str) else m.get("label") or m["name"] for m in recipe.get(key) or []]


def controls(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's controls; a run folder's recipe has every key, so that no default is needed here."""
    return dict(recipe.get("controls") or {})


def scored_labels(recipe: Mapping[str, Any]) -> list[str]:
    """What is scored, in the run's order."""
    named = controls(recipe)
    lengths = [name for name in ("longest", "shortest") if named.get(name)]
    return [*labels(recipe, "methods"), *(f"random-{seed}" for seed in named.get("random_seeds", ())), *lengths]


def models(recipe: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every model that is trained and evaluated: its subset and seed; none where nothing is measured."""
    measured = recipe.get("evaluate") or {}
    if not any(measured.get(key) for key in ("pairs", "heldout", "gsm8k")):
        return []
    seeds, budgets, named = recipe.get("train_seeds") or [0], recipe.get("budget"), controls(recipe)
    budgets = budgets if isinstance(budgets, list) else [budgets]
    draws = [f"random-{seed}" for seed in named.get("random_seeds", ())]
    found: list[tuple[str, int]] = []
    for label in scored_labels(recipe):
        own = [seeds[draws.index(label) % len(seeds)]] if label in draws else seeds
        found += [(layout.chosen(label, budget, len(budgets)), seed) for budget in budgets for seed in own]
    whole = [*labels(recipe, "mix"), *(n for k, n in (("full", "full"), ("dpo_direct", "dpo-direct")) if named.get(k))]
    return found + [(name, seed) for name in whole for seed in seeds]


# -- what is under way, and what was spent ----------------------------------------------------------------------------


def read(path: Path) -> Any:
    """A JSON file, None where it isn't there or is being replaced."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def age(path: Path) -> float:
    """Seconds since a file was written, by this machine's clock; infinite where there is none."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return float("inf")


def spent(folder: Path, now: list[dict[str, Any]]) -> Spent:
    """What all stages took, those under way too."""
    parts = [*Meter(folder).entries(), *now]
    parts = [e for e in parts if not str(e["stage"]).startswith("score ")]  # it encloses the stages it ran
    return Spent(sum(e["seconds"] for e in parts), float(sum(e.get("flops") or 0.0 for e in parts)))


def planned(folder: Path) -> Spent | None:
    """What the last `keepset plan` of the folder said; None without one."""
    plan = read(folder / layout.PLAN)
    return Spent(plan["total_seconds"], plan["total_flops"]) if isinstance(plan, dict) else None


def last_finding(folder: Path) -> str:
    """The text of the last warning; "" without one."""
    found = [f for f in as_list(read(folder / layout.FINDINGS)) if isinstance(f, dict) and f.get("level") == "warning"]
    return f"{found[-1].get('method') or 'run'}: {found[-1].get('text', '')}" if found else ""


# -- who is there -----------------------------------------------------------------------------------------------------


def leader(folder: Path) -> list[Worker]:
    """The process of this machine that has locked the folder, by the kernel's list of locks."""
    try:
        inode = (folder / layout.LOCK).stat().st_ino
        entries = [line.split() for line in LOCKS.read_text().splitlines()]
    except OSError:
        return []
    pids = {int(e[4]) for e in entries if "->" not in e and e[1] == "FLOCK" and e[5].rpartition(":")[2] == str(inode)}
    return [Worker(socket.gethostname(), max(pid, 0), (), True) for pid in sorted(pids) if holds(pid, folder)]


def holds(pid: int, folder: Path) -> bool:
    """Whether a process has the folder's lock file open; True where that can't be seen."""
    lock = os.path.realpath(folder / layout.LOCK)
    try:
        files = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True
    for file in files:
        with suppress(OSError):
            if os.readlink(file) == lock:
                return True
    return False


def claimants(folder: Path) -> list[Worker]:
    """The workers of `keepset work`, by what they claim; alive: their claims were touched within the patience."""
    held: dict[str, list[tuple[str, float]]] = {}
    for path in sorted(folder.glob("*")):
        if generation(path) >= 0:
            with suppress(OSError):
                held.setdefault(path.read_text(), []).append((path.name.rpartition(".")[0], age(path)))
    found = []
    for owner, claims in held.items():
        host, _, rest = owner.partition(":")
        pid = rest.partition(":")[0]
        alive = min(a for _, a in claims) < PATIENCE + PATIENCE / BEATS
        found.append(Worker(host, int(pid) if pid.isdecimal() else 0, tuple(name for name, _ in claims), alive))
    return found


# -- in words ---------------------------------------------------------------------------------------------------------

SHOWN = 6  # steps that are left, by name


def told(folder: Path, found: Status) -> list[str]:
    """The status as lines."""
    out = [f"{folder}: {found.state}" + (f", {in_words(found.workers)}" if found.workers else "")]
    out += [f"  done  {name}" for name in found.done]
    word = "now" if found.state == "running" else "stopped at"
    out += [f"  {word}   {under_way(entry)}" for entry in found.now]
    if found.state == "running" and not found.now:
        out.append("  now   between two stages: loading, reading or tokenising")
    more = len(found.next) - SHOWN
    out += [f"  next  {name}" for name in found.next[:SHOWN]] + ([f"  next  and {more} more"] if more > 0 else [])
    out.append(f"  price {found.spent}" + (f" of about {found.planned} planned" if found.planned else ""))
    if found.finding:
        out.append(f"  last warning: {found.finding}")
    if found.state in ("stopped", "unfinished"):
        out.append("  the same command goes on where it stopped")
    return out


def under_way(entry: Mapping[str, Any]) -> str:
    """A stage under way: how far, how fast, how long still."""
    work = entry.get("progress")
    if not isinstance(work, dict):
        return f"{entry['stage']}, {clock(entry['seconds'])} so far"
    left = (work["total"] - work["done"]) / work["rate"] if work.get("rate") else None
    speed = "" if left is None else f", {work['rate']:.3g} {work['unit']}/s, {clock(left)} left"
    inner = "" if work["what"] == entry["stage"] else f": {work['what']}"
    far = f"{work['done']}/{work['total']} {work['unit']}"
    return f"{entry['stage']}{inner}, {far}{speed}, {clock(entry['seconds'])} so far"


def in_words(workers: tuple[Worker, ...]) -> str:
    """Who is there."""
    parts = []
    for w in workers:
        who = f"process {w.pid} on {w.host}" if w.pid else f"a process on {w.host}"
        at = f" at {', '.join(w.claims)}" if w.claims else ""
        parts.append(who + at + ("" if w.alive else " (no sign of life)"))
    return "; ".join(parts)
