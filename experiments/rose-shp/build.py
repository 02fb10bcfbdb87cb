"""Build the pool, the target and the held-out pairs of the ROSE-SHP experiment.

pool: 150 uniform Alpaca rows (random_9k), 75 GSM8K, 75 FLAN CoT, 100 SHP chosen answers (20-shot file).
target: the ROSE paper's SHP 2-shot pairs, 18 tasks. Held out: 5- and 10-shot pairs whose prompts are in neither, those
that are length-matched by words first. SHP questions are cut to their first 100 words, so that an answer is left in 256
tokens. Licences: Alpaca CC BY-NC 4.0; GSM8K MIT; FLAN Apache-2.0; SHP/ROSE: none stated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import arguments, draw, plain_prompt, read, write


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    data, out = args.data, args.out / "rose-shp"
    alpaca = [r for r in read(data / "alpaca/alpaca_union.jsonl.zst") if "random_9k" in r["in"]]
    target = read(data / "rose/shp_2_shot.jsonl.zst")
    taken = {r["prompt"] for r in target}
    shp = [r for r in read(data / "rose/shp_20_shot.jsonl.zst") if r["prompt"] not in taken]
    shp = draw(shp, 100)
    taken |= {r["prompt"] for r in shp}
    held = []
    for name in ("shp_10_shot", "shp_5_shot"):
        for row in read(data / f"rose/{name}.jsonl.zst"):
            if row["prompt"] not in taken and row["chosen"] != row["rejected"]:
                taken.add(row["prompt"])
                held.append(row)
    matched = [r for r in held if like_length(r)]
    rest = [r for r in held if not like_length(r)]
    n = min(40, len(matched))
    pairs = [*draw(matched, n), *draw(rest, 64 - n)]

    write(out / "alpaca.jsonl", [{k: r[k] for k in ("instruction", "input", "output")} for r in draw(alpaca, 150)])
    gsm8k = draw(read(data / "gsm8k/train.jsonl.zst"), 75)
    write(out / "gsm8k.jsonl", gsm8k)
    cot = draw([r for r in read(data / "cot/flan_cot.jsonl.zst") if r["task"] != "gsm8k"], 75)
    write(
        out / "cot.jsonl",
        [{"prompt": r["input"], "completion": f"{r['rationale']} So the answer is {r['target']}."} for r in cot],
    )
    write(out / "shp.jsonl", [{"prompt": question(r["prompt"]), "completion": r["chosen"].strip()} for r in shp])
    for name, rows in (("target", target), ("eval", pairs)):
        write(out / f"{name}.jsonl", [{"task": r["task"], "prompt": question(r["prompt"]),
                                       "chosen": r["chosen"], "rejected": r["rejected"]} for r in rows])  # fmt: skip
    print(f"{out}: target {len(target)} pairs, held out {len(pairs)} pairs ({n} length-matched by words)")


def question(prompt: str) -> str:
    return " ".join(plain_prompt(prompt).split()[:100])


def like_length(row: dict[str, str]) -> bool:
    a, b = len(row["chosen"].split()), len(row["rejected"].split())
    return abs(a - b) <= 0.2 * max(a, b)


if __name__ == "__main__":
    main()
