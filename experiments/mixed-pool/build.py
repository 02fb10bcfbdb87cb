"""Build what the mixed-pool comparison adds to experiments/methods-table: in-domain rows to hide, and held-out pairs.

hidden: 37 rows each of SHP, Stack Exchange and HH (question and chosen answer, at most 128 tokens): 10 % of the pool
that they make with all rows of methods-table's five files. eval: 12 pairs each (both sides at most 192
tokens), up to 9 of them length-matched. No question stands in two of target, hidden and eval. SHP comes from the ROSE
paper's shots, HH from hh-rlhf's harmless-base test split (single-turn), Stack Exchange from the shots (eval) and from
other sites' dumps (hidden; questions cut to 40 words, else too few would fit). Licences: as methods-table's; hh-rlhf
MIT; the dumps CC BY-SA.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import Row, arguments, draw, read, write

from keepset.evaluate.preference import length_matched
from keepset.model.encode import Encoder
from keepset.model.load import load_tokenizer
from keepset.recipe import ModelSpec

HIDDEN, EVAL, MATCHED = 37, 12, 9


def load_table_module():
    """methods-table's build.py, whose rules of reading and cutting these rows follow."""
    spec = importlib.util.spec_from_file_location("methods_table", Path(__file__).parents[1] / "methods-table/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load_table_module()


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    data, out = args.data, args.out / "mixed-pool"
    spec = ModelSpec(model_name_or_path="demo", max_length=table.TARGET_TOKENS)
    encoder = Encoder(load_tokenizer(spec), spec)
    hidden = []
    for name, (for_eval, for_hiding) in pairs(data).items():
        target = (args.out / f"methods-table/target-{name}.jsonl").read_text(encoding="utf-8").split("\n")
        taken = {json.loads(line)["prompt"] for line in target if line}
        fit = [r for r in table.unique(for_eval) if r["prompt"] not in taken and fits_both(encoder, r)]
        like = length_matched(*np.array([lengths(encoder, r) for r in fit]).T)
        first = draw([r for r, ok in zip(fit, like, strict=True) if ok], min(MATCHED, int(like.sum())))
        rest = [r for r in fit if r not in first]
        held = [*first, *draw(rest, EVAL - len(first))]
        taken |= {r["prompt"] for r in held}
        rows = [table.row(r["prompt"], r["chosen"]) for r in table.unique(for_hiding) if r["prompt"] not in taken]
        rows = [r for r in rows if all(r.values()) and table.fits(encoder, r, table.POOL_TOKENS)]
        hidden += [{**r, "set": name} for r in draw(rows, HIDDEN)]
        write(out / f"eval-{name}.jsonl", [{**r, "set": name} for r in held])
        print(
            f"{name}: {EVAL} of {len(fit)} pairs held out, {len(first)} length-matched; {HIDDEN} of {len(rows)} hidden"
        )
    write(out / "hidden.jsonl", hidden)


def pairs(data: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    """Pairs to evaluate on, and pairs whose chosen answers may be hidden in the pool."""
    shp, se = (table.shots(data, short, name) for name, short in list(table.SETS.items())[:2])
    dumps = [pair(f"{r['title']}\n\n{r['body']}", r["chosen"], r["rejected"], words=40)
             for path in sorted((data / "stack_exchange").glob("*.zst")) for r in read(path)]  # fmt: skip
    hh = [turns for r in read(data / "hh_rlhf/harmless_base_test_first1312.jsonl.zst") if (turns := single_turn(r))]
    return {"shp": (shp, shp), "stack-exchange": (se, dumps), "hh": (hh, hh)}


def pair(question: str, chosen: str, rejected: str, words: int = table.QUESTION_WORDS) -> Row:
    """A pair whose question is cut to its first words."""
    cut = " ".join(table.plain(question).split()[:words])
    return {"prompt": cut, "chosen": chosen.strip(), "rejected": rejected.strip()}


def single_turn(r: Row) -> Row | None:
    """An HH dialogue of one question; None for longer ones."""
    question, _, chosen = r["chosen"].partition("\n\nAssistant:")
    same, _, rejected = r["rejected"].partition("\n\nAssistant:")
    if same != question or "\n\nHuman:" in chosen + rejected:
        return None
    return pair(question.strip().removeprefix("Human:"), chosen, rejected)


def lengths(encoder: Encoder, r: Row) -> list[int]:
    """Supervised tokens of both sides."""
    prompt = [{"role": "user", "content": r["prompt"]}]
    return [int(encoder.encode_pair(prompt, [{"role": "assistant", "content": r[k]}]).supervised.sum())
            for k in ("chosen", "rejected")]  # fmt: skip


def fits_both(encoder: Encoder, r: Row) -> bool:
    """Whether both sides fit."""
    return table.fits(encoder, {k: r[k] for k in ("prompt", "chosen", "rejected")}, table.TARGET_TOKENS)


if __name__ == "__main__":
    main()
