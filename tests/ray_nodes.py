"""Ray nodes on this machine, one core each, that join and are killed one by one; nothing of them is left.

Run as a script it holds the nodes: each line that comes in lets one join, a JSON line goes out.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
# a dead node is noticed within two seconds, not fifteen
SYSTEM = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
"""For nodes and drivers; with a token in it Ray writes none into the home folder."""


class Nodes:
    """A head and some more nodes, in a session of their own."""

    def __init__(self, more: int) -> None:
        for _ in range(3):  # Ray gives a node 30 seconds to start, which may be too few on a busy machine
            if self.start(more):
                return
            self.close()
        raise AssertionError("no Ray node could be started")

    def start(self, more: int) -> bool:
        """Start the nodes; whether they are there."""
        self.folder = tempfile.mkdtemp(prefix="kr-")  # short: the names of sockets may have 107 letters
        self.raylets: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **ENV, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        started = self.answer()
        if started is None:
            return False
        self.address, self.head = str(started["address"]), int(started["raylet"])
        return all(self.add() for _ in range(more))

    def answer(self) -> dict[str, Any] | None:
        """What the process says; None where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def add(self) -> bool:
        """Let a node join; whether it did."""
        assert self.process.stdin is not None
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        answer = self.answer()
        if answer is not None:
            self.raylets.append(answer["raylet"])
        return answer is not None

    def kill(self) -> None:
        """SIGKILL to all processes of the node that joined first; never the head."""
        raylet = self.raylets.pop(0)
        kill([raylet, *children(raylet)])

    def kill_worker(self) -> bool:
        """SIGKILL to an actor; False where there is none at present."""
        actors = [pid for node in (*self.raylets, self.head) for pid in children(node) if "Worker" in command(pid)]
        kill(actors[:1])
        return bool(actors)

    def close(self) -> None:
        """End everything, and remove what Ray wrote."""
        kill_session(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)


def processes() -> dict[int, tuple[int, int]]:
    """The parent and the session of every living process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent), int(session)
    return found


def children(parent: int) -> list[int]:
    return [pid for pid, (of, _) in processes().items() if of == parent]


def command(pid: int) -> str:
    """How a process is called; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_session(leader: subprocess.Popen[Any], patience: float = 20.0) -> None:
    """SIGKILL to all of the session that a process leads, until none is left."""
    end = time.monotonic() + patience
    while (left := [pid for pid, (_, of) in processes().items() if of == leader.pid]) and time.monotonic() < end:
        kill(left)
        leader.poll()
        time.sleep(0.05)
    leader.wait(patience)
    assert not left, [command(pid) for pid in left]


def main() -> None:
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    out = os.dup(1)
    os.dup2(2, 1)  # what Ray says is no answer

    def say(**answer: Any) -> None:
        os.write(out, (json.dumps(answer) + "\n").encode())

    head = {**NODE, "_system_config": SYSTEM, "temp_dir": sys.argv[1]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    reset_ray_address()  # which is for those who look for a cluster of this machine
    say(address=cluster.address, raylet=cluster.head_node.all_processes["raylet"][0].process.pid)
    for _ in sys.stdin:
        say(raylet=cluster.add_node(**NODE).all_processes["raylet"][0].process.pid)
    kill([pid for pid, (_, of) in processes().items() if of == os.getpid() != pid])  # nobody is there for them
    os._exit(0)


if __name__ == "__main__":
    main()
