"""Build the 200 rows, the target and the held-out data of the large bank (`bank.yaml`).

pool: 36 rows each of Alpaca, Dolly, FLAN (P3) and FLAN CoT, and 56 in-domain rows (questions and chosen answers of SHP
and HH, 28 each). heldout: 10 further rows each of the same four sources. target: 8 pairs each of SHP and HH; eval: 12
each. No question stands in two of them. Rows have at most 80 tokens, in-domain rows and a pair's sides 112. Sources
and licences: those of ../methods-table and ../mixed-pool, whose rules of reading and cutting these rows follow.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import Row, arguments, draw, write

from keepset.model.encode import Encoder
from keepset.model.load import load_tokenizer
from keepset.recipe import ModelSpec

ROW_TOKENS, HIDDEN_TOKENS, PAIR_TOKENS = 80, 112, 112
PER_SOURCE, HELDOUT, HIDDEN = 36, 10, 28
TARGET, EVAL = 8, 12
CHATML = Path(__file__).parents[2] / "src/keepset/demo/chatml.jinja"


def load_mixed_module():
    """mixed-pool's build.py."""
    spec = importlib.util.spec_from_file_location("mixed_pool", Path(__file__).parents[1] / "mixed-pool/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mixed = load_mixed_module()
table = mixed.table


def tokens(encoder: Encoder, prompt: str, answer: str) -> int:
    """Tokens of a row under the chat template without a system line."""
    turns = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    return len(encoder.encode_pair(*turns).input_ids)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    spec = ModelSpec(model_name_or_path="demo", max_length=192, chat_template=str(CHATML.resolve()))
    encoder = Encoder(load_tokenizer(spec), spec)

    def short_row(r: Row, limit: int = ROW_TOKENS) -> bool:
        return all(r.values()) and table.fits(encoder, r, table.POOL_TOKENS + 64) and (
            tokens(encoder, r["prompt"], r["completion"]) <= limit)  # fmt: skip

    def short_pair(r: Row) -> bool:
        return mixed.fits_both(encoder, r) and all(
            tokens(encoder, r["prompt"], r[side]) <= PAIR_TOKENS for side in ("chosen", "rejected")
        )

    out = args.out / "validate"
    pool, heldout = [], []
    for name, rows in table.sources(args.data).items():
        if name == "gsm8k":
            continue  # too few are as short
        candidates = draw(table.unique(rows), min(1000, len(table.unique(rows))))
        short = draw([r for r in candidates if short_row(r)], PER_SOURCE + HELDOUT)
        pool += [{**r, "source": name} for r in short[:PER_SOURCE]]
        heldout += [{**r, "source": name} for r in short[PER_SOURCE:]]
    target, held = [], []
    every = mixed.pairs(args.data)
    aims = {"shp": every["shp"][0], "hh": [*table.shots(args.data, "hh", "hh"), *every["hh"][0]]}
    for name, rows in aims.items():
        short = [r for r in table.unique(rows) if short_pair(r)]
        drawn = draw(short, TARGET + EVAL)
        target += [{**r, "set": name} for r in drawn[:TARGET]]
        held += [{**r, "set": name} for r in drawn[TARGET:]]
        taken = {r["prompt"] for r in drawn}
        answers = [table.row(r["prompt"], r["chosen"]) for r in table.unique(rows) if r["prompt"] not in taken]
        answers = [r for r in answers if short_row(r, HIDDEN_TOKENS)]
        pool += [{**r, "source": name} for r in draw(answers, HIDDEN)]
        print(f"{name}: {TARGET + EVAL} of {len(short)} short pairs, {HIDDEN} of {len(answers)} short answers")
    for name, rows in {"pool": pool, "heldout": heldout, "target": target, "eval": held}.items():
        write(out / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
