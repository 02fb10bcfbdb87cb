"""Build the files of all DavIR experiments: short rows of Alpaca, GSM8K and Dolly as pools, others held out.

Alpaca: the uniform sample of the 52K (random_9k). Lengths are words of prompt and answer; the limits are there
because a CPU pays for every token, and they narrow the range over which a tie to length can show. Licences: Alpaca
CC BY-NC 4.0, GSM8K MIT, Dolly CC BY-SA 3.0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import Row, arguments, draw, read, write


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    data, out = args.data, args.out / "davir"
    alpaca = distinct([{k: r[k] for k in ("instruction", "input", "output")}
                       for r in read(data / "alpaca/alpaca_union.jsonl.zst") if "random_9k" in r["in"]])  # fmt: skip
    gsm8k = distinct(read(data / "gsm8k/train.jsonl.zst"))
    dolly = distinct(read(data / "dolly/dolly_3k.jsonl.zst"))
    test = read(data / "gsm8k/test_first819.jsonl.zst")

    middle = draw(between(alpaca, 6, 100), 260)
    write(out / "alpaca.jsonl", middle[:200])
    write(out / "alpaca-heldout.jsonl", middle[200:])
    write(out / "gsm8k.jsonl", draw(between(gsm8k, 6, 100), 120))
    write(out / "gsm8k-heldout.jsonl", draw(between(test, 6, 100), 40))
    write(out / "dolly.jsonl", draw(between(dolly, 6, 100), 200))

    short = draw(between(alpaca, 6, 44), 1100, seed=1)
    write(out / "alpaca-short.jsonl", short[:1000])
    write(out / "alpaca-short-heldout.jsonl", short[1000:])

    rare = [r for r in between(dolly, 6, 60) if r["category"] == "creative_writing"]
    common = [r for r in between(dolly, 6, 60) if r["category"] in ("open_qa", "classification", "brainstorming")]
    write(out / "dolly-imbalanced.jsonl", [*draw(common, 114), *draw(rare, 6)])
    for path in sorted(out.glob("*.jsonl")):
        print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8'))} rows")


def distinct(rows: list[Row]) -> list[Row]:
    """Every content once, so that nothing held out stands in a pool."""
    return list({content(r): r for r in rows}.values())


def content(row: dict[str, Any]) -> str:
    return "\n".join(str(row.get(k) or "") for k in ("instruction", "input", "question", "output", "answer"))


def between(rows: list[Row], low: int, high: int) -> list[Row]:
    return [r for r in rows if low <= len(content(r).split()) <= high and (r.get("output") or r.get("answer"))]


if __name__ == "__main__":
    main()
