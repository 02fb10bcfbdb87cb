"""Build the pools and targets of the three recipes that `plan` is held against `run` with.

text: 20,000 Alpaca and CodeAlpaca rows, 40 SHP pairs. davir: 150 Alpaca rows. rose: 100 Alpaca rows, 8 SHP pairs of two
tasks. Held out for davir and rose: 12 other SHP pairs. SHP questions are cut to 60 words, answers to 80.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import arguments, draw, plain_prompt, read, write


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    data, out = args.data, args.out / "plan-vs-run"
    keys = ("instruction", "input", "output")
    alpaca = [{k: r.get(k, "") for k in keys} for r in read(data / "alpaca/alpaca_union.jsonl.zst")]
    code = [{k: r.get(k) or "" for k in keys} for r in read(data / "codealpaca/new_codealpaca.jsonl.zst")]
    usable = [r for r in [*alpaca, *code] if r["instruction"].strip() and r["output"].strip()]
    shp = [short(r) for r in read(data / "rose/shp_20_shot.jsonl.zst")]
    write(out / "text.jsonl", draw(usable, 20_000))
    write(out / "davir.jsonl", draw(alpaca, 150, seed=1))
    write(out / "rose.jsonl", draw(alpaca, 100, seed=2))
    write(out / "target40.jsonl", draw(shp, 40))
    tasks = sorted({r["task"] for r in shp})[:2]
    write(out / "target8.jsonl", [r for t in tasks for r in [r for r in shp if r["task"] == t][:4]])
    write(out / "eval.jsonl", draw([r for r in shp if r["task"] not in tasks], 12, seed=3))


def short(row: dict[str, str]) -> dict[str, str]:
    cut = {name: " ".join(row[name].split()[:80]) for name in ("chosen", "rejected")}
    return {"task": row["task"], "prompt": " ".join(plain_prompt(row["prompt"]).split()[:60]), **cut}


if __name__ == "__main__":
    main()
