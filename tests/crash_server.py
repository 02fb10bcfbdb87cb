"""A process that has everything imported and forks a child for each run of `keepset run` that is to be killed.

Importing torch and its friends takes seconds, a tiny run less: so one warm parent serves all kill tests. It reads one
JSON request a line and answers one JSON line. Run with OMP_NUM_THREADS=1: a process that has threads must not fork.

Request: {"argv": [...], "run_dir": path, "log": path}, and any of
    "events": path      write the names of all points passed to this file
    "kill": name        SIGKILL at this point; "torn": true cuts the file it concerns to half before
    "after": seconds    "signal": number    send the child a signal after this time (default SIGKILL)
    "at": name          with "signal": send it at this point instead
    "limit": bytes      RLIMIT_FSIZE: no file may grow beyond
    "env": {...}        more of the environment
Answer: {"exit": code or null, "signal": number or null}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from lean import lean

HEX = re.compile(r"(?<![0-9a-f])(?:[0-9a-f]{16}|[0-9a-f]{8})(?![0-9a-f])")

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "http.client.connect"}


class Points:
    """Names every change of the run folder as it is about to happen, and acts at the wanted one.

    `open F`, `sync F` (written, not yet on disk), `rename F` (F: the final name), `remove F`, `mkdir F`,
    `step N F` (an optimiser step of the training in F is done), `save F` (torch writes F). Hashes in F become `*`; from
    the second time on a name ends in ` #2` ...
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self.root = os.path.realpath(request["run_dir"])
        self.request = request
        self.seen: Counter[str] = Counter()
        self.names: list[str] = []

    def place(self, path: Any) -> str | None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return None
        full = os.path.abspath(path)
        if not full.startswith(self.root + os.sep):
            return None
        return HEX.sub("*", full[len(self.root) + 1 :])

    def reach(self, kind: str, path: Any) -> None:
        place = self.place(path)
        if place is None or place == ".lock":
            return
        name = f"{kind} {place}"
        self.seen[name] += 1
        name += f" #{self.seen[name]}" if self.seen[name] > 1 else ""
        self.names.append(name)
        if name == self.request.get("kill"):
            if self.request.get("torn"):
                os.truncate(path, os.stat(path).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == self.request.get("at"):
            os.kill(os.getpid(), self.request["signal"])

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in NETWORK and not (event == "socket.connect" and isinstance(args[1], str | bytes)):  # str: AF_UNIX
            self.names.append(f"network {event} {args[-1] if event == 'socket.connect' else args[0]}")
            raise PermissionError(f"no network in this test: {event} {args}")
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.reach("open", args[0])
        elif event == "os.rename":
            self.reach("rename", args[1])
        elif event in ("os.remove", "os.mkdir"):
            self.reach(event.removeprefix("os."), args[0])
        elif event == "shutil.rmtree":
            self.reach("remove", args[0])

    def install(self) -> None:
        import torch

        from keepset.train.record import Recorder

        fsync, save, on_step_end = os.fsync, torch.save, Recorder.on_step_end

        def noted_fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if not os.path.isdir(path):
                self.reach("sync", path)
            fsync(fd)

        def noted_save(thing: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            self.reach("save", file)
            save(thing, file, *args, **kwargs)

        def noted_step(recorder: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(recorder, args, state, control, **kwargs)
            self.reach(f"step {state.global_step}", Path(args.output_dir).parent)

        os.fsync, torch.save, Recorder.on_step_end = noted_fsync, noted_save, noted_step  # type: ignore[assignment,method-assign]
        sys.addaudithook(self.audit)


def child(request: dict[str, Any]) -> int:
    """Run the command line in this (forked) process."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from keepset import cli

    os.environ.update(request.get("env", {}))
    points = Points(request)
    points.install()
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    sys.argv = ["keepset", *request["argv"]]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    if "events" in request:
        Path(request["events"]).write_text("\n".join(points.names))
        Path(request["events"] + ".modules").write_text("\n".join(sys.modules))
    return code


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, perhaps send a signal after a while, wait."""
    pid = os.fork()
    if pid == 0:
        os._exit(child(request))
    if "after" in request:
        time.sleep(request["after"])
        os.kill(pid, request.get("signal", signal.SIGKILL))  # a zombie at worst: it has not been waited for
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    if "events" in request and not killed:
        learn(Path(request["events"] + ".modules"))
    return {"exit": None if killed else os.WEXITSTATUS(status), "signal": os.WTERMSIG(status) if killed else None}


def learn(modules: Path) -> None:
    """Import what an undisturbed child has imported as it went, so that the next ones needn't: half of their time."""
    for name in modules.read_text().splitlines():
        if name not in sys.modules:
            with contextlib.suppress(ImportError, ValueError):  # names that a library made up
                importlib.import_module(name)
    lean()
    assert threading.active_count() == 1


def main() -> None:
    """Import everything, say so, serve."""
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import keepset

    for module in pkgutil.walk_packages(keepset.__path__, "keepset."):
        if not module.name.endswith("__main__"):  # which runs the command line
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    lean()
    assert threading.active_count() == 1
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
