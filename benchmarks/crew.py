"""Two processes of one thread each against one: forks, `keepset work` and Ray, for losses and gradients.

Run `python benchmarks/crew.py` on a quiet machine (SmolLM2-135M on two cores: about 15 minutes; needs `make demo`'s
model and Ray). Every contender does the whole recipe in a folder of its own and must end with the same bytes. Two
figures each: seconds of the whole commands, with all that starts, and `pass`: shards a second from the moment when
every worker may have committed its first one to the last. The whole command of gradients trains a warm-up on a tenth of
the rows, which one worker does. Their ratios are to one process of the same repetition. Then what
Ray itself costs: starting, its actors, a shard in which nothing is done. `--model FOLDER --rows 12` is quick.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import yaml
from memory import write_pool

OUT = Path(__file__).resolve().parent / "results" / "crew.json"
METHODS = {"losses": ("loss", "losses-*"), "gradients": ("less", "influence-*")}
WORKERS = {"one process": 1, "batching.workers: 2": 2, "keepset work x 2": 2, "Ray x 2": 2}
SHARDS = 200  # in which nothing is done

NO_RAY = """
import sys
import keepset
sys.argv = ["keepset", "score", "loss", "--quiet", *sys.argv[1:]]
from keepset.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
sys.exit(int("ray" in sys.modules))
"""


def contend(who: str, recipe: dict[str, Any], folder: Path) -> tuple[float, float, str]:
    """Do a recipe; seconds, shards a second once all workers are at it, and a hash of the scores."""
    own = {**recipe, "run_dir": str(folder)}
    if who == "batching.workers: 2":
        own["batching"] = {**recipe["batching"], "workers": 2}
    if who == "Ray x 2":
        own["executor"] = {"name": "ray", "workers": 2}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(own))
    command = [sys.executable, "-m", "keepset", "work" if "work" in who.split() else "run", str(path)]
    start = time.perf_counter()
    with folder.with_suffix(".log").open("w") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(2 if "work" in command else 1)]
        codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - start
    if any(codes):
        sys.exit(f"{who}: {folder.with_suffix('.log').read_text()[-2000:]}")
    scores = b"".join(p.read_bytes() for p in sorted(folder.glob("scores/*.parquet")))
    return seconds, rate(folder, recipe, WORKERS[who]), hashlib.sha256(scores).hexdigest()


def rate(folder: Path, recipe: dict[str, Any], workers: int) -> float:
    """Shards a second of the pass, from the commit by which each worker may have done one to the last."""
    pattern = next(glob for method, glob in METHODS.values() if method == recipe["methods"][0])
    times = sorted(p.stat().st_mtime for p in folder.glob(f"work/{pattern}/*/[0-9]*.json"))
    return (len(times) - workers) / (times[-1] - times[workers - 1])


def ray_costs(folder: Path) -> dict[str, float]:
    """Seconds until Ray is there, until two actors are, and of a shard in which nothing is done."""
    from keepset.runfolder.execute import Task
    from keepset.runfolder.execute_ray import ray_executor

    times = [time.perf_counter()]
    executor = ray_executor(folder, None, 2, False, lambda line: None)
    for numbers in (range(2), range(SHARDS)):
        times.append(time.perf_counter())
        executor.run(Task(operator.is_, None), numbers, is_there=lambda n: True, advance=lambda n: None)
    times.append(time.perf_counter())
    executor.crew.ray.shutdown()
    start, actors, shards = (after - before for before, after in zip(times, times[1:], strict=False))
    return {"start": start, "actors": actors, "shard": shards / SHARDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--shard-rows", type=int, default=4)
    parser.add_argument("--what", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"put the figures into {OUT.name}")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="crew-") as name:
        folder = Path(name)
        write_pool(folder / "pool.jsonl", args.rows)
        write_pool(folder / "target.jsonl", 2)
        for what in args.what:
            method, _ = METHODS[what]
            recipe = {
                "model": {"model_name_or_path": args.model, "device": "cpu"}, "pool": str(folder / "pool.jsonl"),
                "methods": [method], "budget": "25%", "controls": {"random_seeds": [], "longest": False},
                "batching": {"shard_rows": args.shard_rows},
            }  # fmt: skip
            if what == "gradients":
                recipe |= {"target": str(folder / "target.jsonl"), "warmup": {"num_train_epochs": 1, "fraction": 0.1}}
            for repetition in range(args.repetitions):
                hashes = set()
                for number, who in enumerate(WORKERS):
                    place = folder / f"{method}-{repetition}-{number}"
                    seconds, speed, scores = contend(who, recipe, place)
                    hashes.add(scores)
                    runs.append({"what": what, "who": who, "seconds": seconds, "rate": speed, "of": repetition})
                    print(f"{what}, {who}: {seconds:.1f} s, {speed:.2f} shards a second in the pass", flush=True)
                if len(hashes) > 1:
                    sys.exit(f"{what}: the contenders' scores differ")
        summary = {(what, who): ratios(runs, what, who) for what in args.what for who in WORKERS}
        print(f"\n| {args.rows} rows of 60 words, {args.model} | whole command | pass |\n|---|---|---|")
        for (what, who), (whole, speed) in summary.items():
            print(f"| {what}, {who} | {whole:.2f} x | {speed:.2f} x |")
        ray = ray_costs(folder / "ray")
        print(f"\nRay: {ray['start']:.1f} s to start, {ray['actors']:.1f} s for two actors, "
              f"{1000 * ray['shard']:.1f} ms a shard in which nothing is done")  # fmt: skip
        score = ["--pool", str(folder / "pool.jsonl"), "--run_dir", str(folder / "bare"), "--model_name_or_path",
                 args.model]  # fmt: skip
        imported = subprocess.run([sys.executable, "-c", NO_RAY, *score], stdout=subprocess.DEVNULL).returncode
        print(f"`keepset score` without the executor imports Ray: {'yes' if imported else 'no'}")
    if args.write:
        day = datetime.date.today().isoformat()
        OUT.write_text(
            json.dumps({"date": day, "rows": args.rows, "model": args.model, "runs": runs, "ray": ray}) + "\n"
        )


def ratios(runs: list[dict[str, Any]], what: str, who: str) -> tuple[float, float]:
    """The medians over repetitions of one process's seconds over this one's, and of this one's rate over its."""
    own = [run for run in runs if (run["what"], run["who"]) == (what, who)]
    one = [run for run in runs if (run["what"], run["who"]) == (what, "one process")]
    pairs = list(zip(own, one, strict=True))
    return (statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
            statistics.median(a["rate"] / b["rate"] for a, b in pairs))  # fmt: skip


if __name__ == "__main__":
    main()
