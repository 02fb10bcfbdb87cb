"""`make soak`: tiny whole runs killed N times in all, resumed, and compared byte by byte.

A folder takes up to six kills, each in a session that went on where the last one was stopped, and is then finished and
compared. Three are at points drawn from the changes that a run makes to its folder, one from each third of them (and
where the point is a sync, the file is cut in two), three at random times. Exit code 1 if anything differed.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from crash import TinyRun


def main(kills: int) -> int:
    """Kill at least `kills` times; the number of folders that came out otherwise."""
    folder, draw = Path(tempfile.mkdtemp(prefix="keepset-soak-")), random.Random(kills)
    start = time.monotonic()
    tiny = TinyRun(folder)
    whole = time.monotonic()
    tiny.server.run(tiny.recipe, folder / "timed")
    seconds = time.monotonic() - whole
    points = [p for p in tiny.points if "#" not in p]  # counted from a session's start: not the same in the next one
    failed = done = folders = 0
    print(f"{len(tiny.points)} points; an undisturbed run takes {seconds:.1f} s", flush=True)
    while done < kills:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        killed: list[str] = []
        differs: list[str] = []
        for part in range(3):
            what = draw.choice(points[len(points) * part // 3 : len(points) * (part + 1) // 3])
            after = draw.uniform(0.05, seconds / 3)
            for request in ({"kill": what, "torn": what.startswith("sync ")}, {"after": after}):
                answer = tiny.server.run(tiny.recipe, run, **request)
                if answer["signal"] == 9:
                    killed.append(str(request))
                elif answer["exit"] != 0:  # 0: the session was quicker, or the point lies behind it
                    differs.append(f"{request}: {answer}")
        done += len(killed)
        folders += 1
        try:
            differs += tiny.resumed(run)
        except AssertionError as error:
            differs.append(str(error)[-2000:])
        if differs:
            failed += 1
            print(f"FAILED {killed}: differs: {differs}", flush=True)
        if folders % 10 == 0:
            print(f"{done} kills in {folders} folders, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    tiny.server.close()
    shutil.rmtree(folder)
    print(f"{done} kills in {folders} folders: {folders - failed} folders byte-equal, {failed} failed, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 300) else 0)
