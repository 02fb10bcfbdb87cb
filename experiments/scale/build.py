"""Build what `run.py` measures on: pools of 10K, 50K and 200K rows of real text, a target, a small model.

Distinct rows of public sets (Alpaca, its revised answers, AlpacaEval's model outputs, Code Alpaca, Dolly, FLAN's chains
of thought and P3 rows, GSM8K, Stack Exchange, the prompts of ROSE's test sets with their golden answers), prompt and
answer cut to their first 16 words, are shuffled; those that become equal by that are one row. A pool is the first n of
them. Where they don't suffice, real prompts are joined with real answers of the same set, at random, each pair once
(`made` in the file says so). The target is 10 pairs of SHP, of 5 tasks. Written beside them: `counts.json`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from public_data import arguments, plain_prompt, read, write

SIZES = (10_000, 50_000, 200_000)
WORDS = 16
VOCABULARY = 2_000
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
Texts = tuple[str, str, str]
"""The set that a row is from, its prompt and its answer."""


def sources(data: Path) -> Iterator[Texts]:
    """Every usable row of the public sets, whole."""
    for row in read(data / "alpaca/alpaca_union.jsonl.zst"):
        yield "alpaca", f"{row['instruction']} {row['input']}", row["output"]
    for row in read(data / "alpaca_revised/train.jsonl.zst"):
        yield from (("alpaca-revised", row["prompt"], row[side]) for side in ("chosen", "rejected"))
    prompts = {row["id"]: row["instruction"] for row in read(data / "alpaca_eval/instructions.jsonl.zst")}
    for row in read(data / "alpaca_eval/model_outputs.jsonl.zst"):
        yield "alpaca-eval", prompts[row["id"]], row["output"]
    for row in read(data / "codealpaca/new_codealpaca.jsonl.zst"):
        yield "codealpaca", f"{row['instruction']} {row['input'] or ''}", row["output"] or ""
    for row in read(data / "dolly/dolly_3k.jsonl.zst"):
        yield "dolly", f"{row['instruction']} {row['input']}", row["output"]
    for row in read(data / "cot/flan_cot.jsonl.zst"):
        yield f"cot-{row['task']}", row["input"], f"{row['rationale']} {row['target']}"
    for row in read(data / "flan/p3_t0_train.jsonl.zst"):
        yield "p3", row["prompt"], row["completion"].removesuffix("<|endoftext|>")
    for row in read(data / "gsm8k/train.jsonl.zst"):
        yield "gsm8k", row["question"], row["answer"]
    for path in sorted((data / "stack_exchange").glob("*.zst")):
        for row in read(path):
            yield from (
                ("stack-exchange", f"{row['title']} {row['body']}", row[side]) for side in ("chosen", "rejected")
            )
    for name in ("shp", "se", "hh"):
        for row in read(data / f"rose/{name}_test_prompts.jsonl.zst"):
            yield f"rose-{name}", plain_prompt(row["prompt"]), row["golden_answer"]


def short(text: str) -> str:
    """The first words."""
    return " ".join(text.split()[:WORDS])


def recombined(real: list[Texts], rng: random.Random) -> Iterator[Texts]:
    """Prompts with answers of other rows of their set, each pair once and none that is a real row."""
    answers: dict[str, list[str]] = {}
    for source, _, answer in real:
        answers.setdefault(source, []).append(answer)
    taken = set(real)
    while True:
        source, prompt, _ = rng.choice(real)
        row = (source, prompt, rng.choice(answers[source]))
        if row not in taken:
            taken.add(row)
            yield row


def save_model(folder: Path, texts: list[str]) -> None:
    """A 2-layer Llama with random weights and a byte-level BPE tokenizer trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import tiny_model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=512).save_pretrained(folder)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    out, rng = args.out / "scale", random.Random(0)
    cut = ((source, short(prompt), short(answer)) for source, prompt, answer in sources(args.data))
    real = list(dict.fromkeys(row for row in cut if row[1] and row[2]))
    rng.shuffle(real)
    more = list(islice(recombined(real, rng), max(0, max(SIZES) - len(real))))
    rows: list[dict[str, Any]] = [
        {"instruction": prompt, "input": "", "output": answer, "set": source, "made": k >= len(real)}
        for k, (source, prompt, answer) in enumerate([*real, *more])
    ]
    for n in SIZES:
        write(out / f"pool-{n}.jsonl", rows[:n])
    pairs = read(args.data / "rose/shp_2_shot.jsonl.zst")[:10]
    goals = [{"task": r["task"], "prompt": short(plain_prompt(r["prompt"])),
              **{side: short(r[side]) for side in ("chosen", "rejected")}} for r in pairs]  # fmt: skip
    write(out / "target.jsonl", goals)
    save_model(out / "model", [f"{prompt}\n{answer}" for _, prompt, answer in real[:20_000]])
    counts = {"distinct": len(real), "recombined": len(more), "words": WORDS, "vocabulary": VOCABULARY}
    (out / "counts.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
    print(counts)


if __name__ == "__main__":
    main()
