"""Build the pool: 400 rows of Alpaca's uniform sample, 6 to 20 words of prompt and answer together (CC BY-NC 4.0)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import arguments, draw, read, write


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    texts = {}
    for row in read(args.data / "alpaca/alpaca_union.jsonl.zst"):
        if "random_9k" in row["in"]:
            kept = {k: row[k] for k in ("instruction", "input", "output")}
            texts["\n".join(kept.values())] = kept
    short = [row for text, row in texts.items() if 6 <= len(text.split()) <= 20 and row["output"]]
    write(args.out / "davir-fraction" / "alpaca.jsonl", draw(short, 400))


if __name__ == "__main__":
    main()
