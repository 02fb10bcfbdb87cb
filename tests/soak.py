"""`make soak`: a tiny whole run killed N times, each time in a folder of its own, resumed, and compared byte by byte.

Half the kills are at points drawn from all changes that a run makes to its folder (and half of those at a sync, with
the file cut in two), half at random times. Prints what differed; exit code 1 if anything did.
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
    """Kill `kills` times; the number of runs that came out otherwise."""
    folder, draw = Path(tempfile.mkdtemp(prefix="keepset-soak-")), random.Random(kills)
    start = time.monotonic()
    tiny = TinyRun(folder)
    whole = time.monotonic()
    tiny.server.run(tiny.recipe, folder / "timed")
    seconds = time.monotonic() - whole
    failed = done = 0
    print(f"{len(tiny.points)} points; an undisturbed run takes {seconds:.1f} s", flush=True)
    while done < kills:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        if done % 2:
            what = f"after {draw.uniform(0.05, seconds):.2f} s"
            answer = tiny.server.run(tiny.recipe, run, after=float(what.split()[1]))
        else:
            what = draw.choice(tiny.points)
            torn = what.startswith("sync ")
            answer = tiny.server.run(tiny.recipe, run, kill=what, torn=torn)
        if answer["exit"] == 0:  # it was quicker this time
            continue
        done += 1
        try:
            differs = tiny.resumed(run)
        except AssertionError as error:
            differs = [str(error)[-2000:]]
        if answer["signal"] != 9 or differs:
            failed += 1
            print(f"FAILED {what}: signal {answer['signal']}, differs: {differs}", flush=True)
        if done % 25 == 0:
            print(f"{done} kills, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    tiny.server.close()
    shutil.rmtree(folder)
    print(f"{done} kills (half at points, half at times): {done - failed} byte-equal, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 300) else 0)
