"""Build a mixed pool of 1,000 short rows and the targets that methods are compared on.

pool: 200 rows each of Alpaca (the uniform sample), Dolly, FLAN (P3), FLAN CoT and GSM8K, drawn among those of at most
128 tokens under SmolLM2's chat template, its default system prompt included. Short rows are not a uniform sample of
their source. targets: 12 single-turn pairs each of SHP, Stack Exchange and HH, drawn among the ROSE paper's shots of
all sizes whose two sides, the question cut to its first 60 words, fit in 192 tokens. A `set` column holds the data
set's name and `task` its own part (subreddit, site, subset). Licences: Alpaca CC BY-NC 4.0; Dolly CC BY-SA 3.0; FLAN
Apache-2.0; GSM8K MIT; SHP, SE and HH by ROSE: none stated.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import Row, arguments, draw, plain_prompt, read, write

from keepset.model.encode import Encoder, RowRefused
from keepset.model.load import load_tokenizer
from keepset.recipe import ModelSpec

POOL_TOKENS, TARGET_TOKENS, QUESTION_WORDS = 128, 192, 60
PER_SOURCE, PER_TARGET = 200, 12
SETS = {"shp": "shp", "stack-exchange": "se", "hh": "hh"}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    data, out = args.data, args.out / "methods-table"
    spec = ModelSpec(model_name_or_path="demo", max_length=TARGET_TOKENS)
    encoder = Encoder(load_tokenizer(spec), spec)
    for name, rows in sources(data).items():
        short = [r for r in unique(rows) if fits(encoder, r, POOL_TOKENS)]
        write(out / f"{name}.jsonl", draw(short, PER_SOURCE))
        print(f"{name}: {PER_SOURCE} of {len(short)} short rows among {len(rows)}")
    for name, short_name in SETS.items():
        pairs = [r for r in unique(shots(data, short_name, name)) if fits(encoder, r, TARGET_TOKENS)]
        write(out / f"target-{name}.jsonl", draw(pairs, PER_TARGET))
        print(f"target {name}: {PER_TARGET} of {len(pairs)} short pairs")


def sources(data: Path) -> dict[str, list[Row]]:
    """Every source as prompt and completion."""
    alpaca = [r for r in read(data / "alpaca/alpaca_union.jsonl.zst") if "random_9k" in r["in"]]
    cot = [r for r in read(data / "cot/flan_cot.jsonl.zst") if r["task"] != "gsm8k"]
    return {
        "alpaca": [row(joined(r), r["output"]) for r in alpaca],
        "dolly": [row(joined(r), r["output"]) for r in read(data / "dolly/dolly_3k.jsonl.zst")],
        "flan": [
            row(r["prompt"], r["completion"].removesuffix("<|endoftext|>"))
            for r in read(data / "flan/p3_t0_train.jsonl.zst")
        ],
        "cot": [row(r["input"], f"{r['rationale']} So the answer is {r['target']}.") for r in cot],
        "gsm8k": [row(r["question"], r["answer"]) for r in read(data / "gsm8k/train.jsonl.zst")],
    }


def shots(data: Path, short_name: str, name: str) -> list[Row]:
    """The ROSE paper's pairs of one data set, all shot files together, markup and long questions cut."""
    rows = []
    for n in (1, 2, 5, 10, 20):
        for r in read(data / f"rose/{short_name}_{n}_shot.jsonl.zst"):
            question = plain(plain_prompt(r["prompt"]))
            if "\n\nAssistant:" not in question:
                rows.append({"set": name, "task": r["task"], "prompt": " ".join(question.split()[:QUESTION_WORDS]),
                             "chosen": plain(r["chosen"]), "rejected": plain(r["rejected"])})  # fmt: skip
    return rows


def plain(text: str) -> str:
    """Without HTML tags."""
    return html.unescape(re.sub(r"</?[a-z][^>]*>", "", text)).strip()


def joined(r: Row) -> str:
    """Instruction and input."""
    return f"{r['instruction']}\n\n{r['input']}" if r["input"] else r["instruction"]


def row(prompt: str, completion: str) -> Row:
    """A row of the pool."""
    return {"prompt": prompt.strip(), "completion": completion.strip()}


def unique(rows: list[Row]) -> list[Row]:
    """One row of each prompt, the first; none with an empty side, and no pair of equal ones."""
    kept: dict[str, Row] = {}
    for r in rows:
        if all(r.values()) and r.get("chosen") != r.get("rejected", ""):
            kept.setdefault(r["prompt"], r)
    return list(kept.values())


def fits(encoder: Encoder, r: Row, most: int) -> bool:
    """Whether every side of the row takes at most so many tokens."""
    try:
        for side in ("completion", "chosen", "rejected"):
            if side in r:
                prompt, answer = {"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[side]}
                if len(encoder.encode_pair([prompt], [answer]).input_ids) > most:
                    return False
    except RowRefused:
        return False
    return True


if __name__ == "__main__":
    main()
