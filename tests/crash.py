"""A tiny whole run for tests that kill, damage and resume it; the warm server that runs it; what must be equal."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tiny_recipe import write_lines

TRAIN = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}

# Tokens in the environment of every run, which no file and no line of output may hold.
SECRETS = {
    "HF_TOKEN": "hf_" + "CanaryCanaryCanaryCanaryCanaryCana",
    "OPENAI_API_KEY": "sk-" + "canary0123456789canary0123456789",
    "WANDB_API_KEY": "canary9876543210canary9876543210canary98",
}


def write_inputs(folder: Path, **changes: Any) -> Path:
    """A tiny model, 18 pool rows (one bad), target and held-out pairs, and the recipe that uses them; its path."""
    from conftest import save_tiny

    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", max_position_embeddings=512)
    rng = np.random.default_rng(0)
    words = ["the", "answer", "is", "user", "thing", "wants", "helpful", "assistant", "that"]

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    pool = [{"instruction": f"q{i} {text(2)}", "input": "", "output": text(2 + i % 5)} for i in range(17)]
    pairs = [{"task": "ab"[i % 2], "prompt": f"p{i}", "chosen": text(4), "rejected": text(3)} for i in range(8)]
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(folder / "model"), "max_length": 200},
        "lora": {"lora_r": 2, "lora_alpha": 4},
        "pool": write_lines(folder / "pool.jsonl", [*pool, {"instruction": "none", "input": "", "output": ""}]),
        "target": write_lines(folder / "target.jsonl", pairs[:4]),
        "methods": ["rose", "davir"],
        "budget": "25%",
        "warmup": {**TRAIN, "fraction": 0.4},
        "reference": TRAIN,
        "train": {**TRAIN, "num_train_epochs": 3},  # the first step of the schedule has rate 0
        "evaluate": {"pairs": [{"path": write_lines(folder / "pairs.jsonl", pairs[4:])}], "bootstrap": 100},
        "controls": {"random_seeds": [0], "longest": False},
        "batching": {"token_budget": 256, "shard_rows": 9},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


class Server:
    """`crash_server.py`, warm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        threads = {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}
        # Online as far as the libraries know: `crash_server` refuses every connection and writes it down.
        env = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", **SECRETS}
        env.pop("HF_HUB_OFFLINE", None)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def run(self, recipe: Path, run_dir: Path, **request: Any) -> dict[str, Any]:
        """`keepset run` in a fork; the answer with the child's output as `log`."""
        log = self.folder / "child.log"
        argv = request.pop("argv", None) or ["run", str(recipe), "--run_dir", str(run_dir)]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "run_dir": str(run_dir), "log": str(log), **request}) + "\n")
        self.process.stdin.flush()
        return {**self._answer(), "log": log.read_text()}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()  # it does nothing now, and taking an interpreter down takes seconds
        self.process.wait(30)


def outcome(run_dir: Path) -> dict[str, str]:
    """sha256 of everything that must come out byte-equal: scores, subsets, weights, evaluated items, the comparison.

    What it cost in seconds differs from run to run and is left out of the comparison.
    """
    found = {}
    for pattern in ("scores/*.parquet", "subsets/*", "data/*", "models/**/*.safetensors", "evaluation/*/*.safetensors"):
        for path in sorted(run_dir.glob(pattern)):
            found[str(path.relative_to(run_dir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    comparison = json.loads((run_dir / "comparison.json").read_text())
    found["comparison.json"] = hashlib.sha256(json.dumps(timeless(comparison), sort_keys=True).encode()).hexdigest()
    subsets = json.loads((run_dir / "subsets.json").read_text())
    found["subsets.json"] = hashlib.sha256(json.dumps(subsets, sort_keys=True).encode()).hexdigest()
    return found


def timeless(value: Any) -> Any:
    """A JSON value without what it cost."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("cost", "seconds", "pareto")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


class TinyRun:
    """The recipe, a run of it that nobody disturbed, and what came out."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder)
        self.recipe = write_inputs(folder / "inputs")
        self.run_dir = folder / "undisturbed"
        events = folder / "events"
        done = self.server.run(self.recipe, self.run_dir, events=str(events))
        assert done["exit"] == 0, done["log"]
        self.log = done["log"]
        self.points = events.read_text().splitlines()
        self.outcome = outcome(self.run_dir)

    def resumed(self, run_dir: Path) -> list[str]:
        """Start the same command again on a disturbed folder; what differs from the undisturbed run."""
        done = self.server.run(self.recipe, run_dir)
        assert done["exit"] == 0, done["log"]
        found = outcome(run_dir)
        return sorted(k for k in {*found, *self.outcome} if found.get(k) != self.outcome.get(k))
