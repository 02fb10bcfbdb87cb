"""What the stages of a run cost: `costs.jsonl`, with what killed sessions spent.

A stage adds its entry when it ends. While it is under way its entry so far lies in `work/costs-open.json`, renewed at
every committed shard and every few seconds, with how far it is (`progress`). The next session finds what a killed one
left there and adds it, marked `stopped`; an entry of the same stage after it is marked `resumed`. So the seconds of all
entries of a stage are what was really spent on it, up to the few seconds before each kill, the work that was lost and
done again included. `cpu_seconds`, the process's own processor time, say more on a machine that is shared or paused.

A worker (another process, perhaps on another machine) leaves each entry as a file of its own in `work/costs/`, which
the process that leads takes over. What a killed worker spent on an unfinished training is in no entry.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepset.memory import Count
from keepset.progress import UNDER_WAY
from keepset.runfolder import layout
from keepset.runfolder.files import write_atomic

BEAT = 5.0  # seconds between renewals


class Meter:
    """The costs of one run folder."""

    def __init__(self, folder: Path, *, worker: bool = False) -> None:
        """Nothing is written before a stage begins.

        Args:
            folder: the run folder.
            worker: another process leads the run.
        """
        self.path, self.open_path = folder / layout.COSTS, folder / layout.OPEN_COSTS
        self.workers, self.worker = folder / layout.WORKERS_COSTS, worker
        self.session = os.urandom(8).hex()
        self.under_way: list[tuple[float, float, dict[str, Any]]] = []  # stages may be nested
        self.guard = threading.Lock()

    @contextmanager
    def timed(self, stage: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Time a stage; what is put into the yielded entry is kept with it, `skip: True` adds nothing."""
        start, cpu, halved = time.perf_counter(), time.process_time(), Count.total
        entry: dict[str, Any] = {"stage": stage, **facts}
        with self.guard:
            self.under_way.append((start, cpu, entry))
        over = threading.Event()
        threading.Thread(target=self.beat, args=(over,), daemon=True).start()
        try:
            yield entry
            done = {**entry, **spent(start, cpu), "session": self.session}
            if Count.total > halved:
                done["halved_batches"] = Count.total - halved
            if not done.pop("skip", False):
                if any(e["stage"] == stage and e.get("stopped") for e in self.since_last(stage)):
                    done["resumed"] = True
                self.add(done)
        except BaseException:
            self.note()  # for the next session
            raise
        finally:
            over.set()
            with self.guard:
                self.under_way = [one for one in self.under_way if one[2] is not entry]
        self.note()

    def beat(self, over: threading.Event) -> None:
        """Renew the open entries until the stage is over."""
        while not over.wait(BEAT):
            self.note()

    def note(self) -> None:
        """Renew the open entries; called after every committed piece of work."""
        if self.worker:
            return
        with self.guard:
            entries = [
                {**entry, **spent(start, cpu), "session": self.session, "stopped": True}
                for start, cpu, entry in self.under_way
            ]
            if entries and UNDER_WAY:
                work = UNDER_WAY[-1]
                entries[-1]["progress"] = {"what": work.what, "done": work.there + work.done, "total": work.total,
                                           "unit": work.unit, "rate": work.rate}  # fmt: skip
            try:
                if not entries:
                    self.open_path.unlink(missing_ok=True)
                    return
                self.open_path.parent.mkdir(parents=True, exist_ok=True)
                part = self.open_path.with_name(self.open_path.name + ".part")
                part.unlink(missing_ok=True)  # it may be a link of other hands
                part.write_text(json.dumps(entries), encoding="utf-8")
                part.replace(self.open_path)
            except OSError:  # a full disk is told by whoever writes what counts
                return

    def settle(self) -> None:
        """Take over what a session that was stopped left; call with the folder locked, before any stage."""
        if self.worker or self.under_way:
            return
        self.collect()
        if not self.open_path.exists():
            return
        try:
            left = json.loads(self.open_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            left = []
        logged = {(e.get("session"), e["stage"]) for e in self.entries()}
        for entry in left if isinstance(left, list) else []:
            if sound(entry) and (entry.get("session"), entry["stage"]) not in logged and not entry.pop("skip", False):
                entry.pop("progress", None)
                self.add(entry)
        self.open_path.unlink(missing_ok=True)

    def collect(self) -> None:
        """Take over what workers have left; of the process that leads."""
        known = {(e.get("session"), e["stage"]) for e in self.entries()}
        for path in sorted(self.workers.glob("*.json")):
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                entry = None
            if sound(entry) and (entry.get("session"), entry["stage"]) not in known:
                self.add(entry)
            path.unlink(missing_ok=True)

    def since_last(self, stage: str) -> list[dict[str, Any]]:
        """The stage's entries after its last whole one."""
        stopped: list[dict[str, Any]] = []
        for entry in self.entries():
            if entry["stage"] == stage:
                stopped = [*stopped, entry] if entry.get("stopped") else []
        return stopped

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry to `costs.jsonl`, which is whole at any time; a worker leaves it in a file of its own."""
        if self.worker:
            entry = {**entry, "session": os.urandom(8).hex()}  # the same stage may be done twice
            write_atomic(self.workers / f"{entry['session']}.json", json.dumps(entry, ensure_ascii=False).encode())
            return
        with self.guard:
            lines = [*(line for line, _ in self.lines()), json.dumps(entry, ensure_ascii=False)]
            write_atomic(self.path, "".join(f"{line}\n" for line in lines).encode())

    def entries(self) -> list[dict[str, Any]]:
        """All entries of `costs.jsonl`."""
        return [entry for _, entry in self.lines()]

    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines of `costs.jsonl` with their entries; what is none (an older keepset's torn lines) is left out."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        whole = []
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if sound(entry):
                whole.append((line, entry))
        return whole


def spent(start: float, cpu: float) -> dict[str, float]:
    """Seconds by the clock and of the processor since then."""
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def sound(entry: Any) -> bool:
    """Whether something read from a file is an entry."""
    return isinstance(entry, dict) and isinstance(entry.get("seconds"), int | float) and "stage" in entry
