"""Handing a trained model and held-out pairs to lm-evaluation-harness, which stays in an environment of its own.

Pairs become a multiple-choice task: the context is the prompt as the template renders it, the choices are both answers.
lm-eval's `acc` is then our accuracy by summed log-probabilities; its `acc_norm` divides by bytes where we divide by
tokens.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.runfolder.files import write_atomic

if TYPE_CHECKING:
    from keepset.model.encode import Encoded

TASK = """# python -m lm_eval --include_path {folder} --tasks {name} ...
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_pair_task(folder: Path, name: str, tokenizer: Any, pairs: Sequence[tuple[Encoded, Encoded]]) -> Path:
    """Write `<name>.yaml` and `<name>.jsonl` into `folder`.

    `folder` is for lm-eval's `--include_path`; a pair's text is what the tokenizer says of its tokens. Returns the
    YAML's path.
    """
    lines = []
    for pair in pairs:
        cuts = [int(np.argmax(side.supervised)) for side in pair]
        # up to the last supervised token: what the template writes after the end of turn is not the answer's
        ends = [int(np.flatnonzero(side.supervised)[-1]) + 1 for side in pair]
        texts = [tokenizer.decode(s.input_ids[a:b]) for s, a, b in zip(pair, cuts, ends, strict=True)]
        context = tokenizer.decode(pair[0].input_ids[: cuts[0]])
        lines.append(json.dumps({"context": context, "chosen": texts[0], "rejected": texts[1]}, ensure_ascii=False))
    data = folder / f"{name}.jsonl"
    write_atomic(data, ("\n".join(lines) + "\n").encode())
    path = folder / f"{name}.yaml"
    write_atomic(path, TASK.format(folder=folder, name=name, data=json.dumps(str(data.absolute()))).encode())
    return path


def command(base: str, adapter: Path | None, tasks: str, folder: Path, out: Path) -> str:
    """The lm-eval command for a model: the base, or the base with a LoRA adapter."""
    model = f"pretrained={base},dtype=float32" + (f",peft={adapter}" if adapter else "")
    words = ["python", "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", tasks,
             "--include_path", str(folder), "--output_path", str(out), "--batch_size", "1"]  # fmt: skip
    return shlex.join(words)
