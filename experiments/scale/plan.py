"""What two jobs with an 8B model would take: 270K rows on one node of 8 H100, 10M rows on 8 such nodes. Nothing is run.

    python experiments/scale/plan.py --data DATA

The model is the configuration of an 8B Llama (32 layers, hidden size 4,096, vocabulary 128,256) without weights, its
tokenizer the small one of `build.py`, whose tokens are about half as long as an 8B model's. Rows: 2,000 of the public
sets, whole (cut at 1,024 tokens). Each method's recipe is the default but for one epoch of the reference and the last
checkpoint of the warm-up alone.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from build import sources
from public_data import arguments, write
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig

from keepset.pipeline.cluster import Cluster
from keepset.pipeline.plan_cluster import plan_cluster, print_cluster
from keepset.recipe import parse_recipe

HERE = Path(__file__).parent
ROWS = 2_000
PRICE = 2.5
JOBS = {
    "270K rows, one node": (270_000, Cluster("h100", gpus=8, price=PRICE)),
    "10M rows, 8 nodes": (10_000_000, Cluster("h100", gpus=8, nodes=8, price=PRICE, network=100)),
    "10M rows, 8 nodes, the reference on 8 GPUs": (
        10_000_000, Cluster("h100", gpus=8, nodes=8, price=PRICE, network=100)
    ),
}  # fmt: skip


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    out = args.out / "scale"
    real = list(dict.fromkeys(row for row in sources(args.data) if row[1].strip() and row[2].strip()))
    rows = random.Random(0).sample(real, ROWS)
    write(out / "whole.jsonl", [{"instruction": prompt, "input": "", "output": answer} for _, prompt, answer in rows])
    LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(out / "llama-8b")  # fmt: skip
    AutoTokenizer.from_pretrained(out / "model").save_pretrained(out / "llama-8b")
    plans = {}
    for name, (n, cluster) in JOBS.items():
        shared = 8 if name.endswith("GPUs") else 1
        recipe = parse_recipe(
            {
                "model": {
                    "model_name_or_path": str(out / "llama-8b"), "dtype": "bfloat16", "overlong": "truncate",
                },
                "pool": str(out / "whole.jsonl"),
                "target": str(out / "target.jsonl"),
                "methods": ["bm25", "dsir", "rds", "davir", "less", "rose"],
                "reference": {"num_train_epochs": 1, "num_processes": shared},
                "warmup": {"checkpoints": "last", "num_processes": shared},
            }
        )  # fmt: skip
        plans[name] = plan_cluster(recipe, cluster, rows=n, console=Console(quiet=True))
        print(name)
        print_cluster(plans[name], Console(width=150))
    (HERE / "results" / "plan.json").write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
