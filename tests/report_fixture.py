"""A made-up run folder for the tests of the report and of explain: no model, but every file of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from keepset.data import load_pool
from keepset.recipe import DataSpec, Recipe

WORDS = (
    "the river town keeps a small library where people read maps of old roads and plan slow walks past mills "
    "farms orchards bridges and quiet harbours before the autumn rain sends them home to soup bread and tea"
).split()

LABELS = {"random": "random-0"}

HOSTILE = [
    "<script>window.hit = 1; fetch('http://127.0.0.1:9/x')</script>",
    "</script><script>window.hit = 2</script>",
    "<img src=x onerror='window.hit=3'>",
    "<svg onload=window.hit=4>",
    "<iframe srcdoc='<script>parent.hit=5</script>'></iframe>",
    "<a href='javascript:window.hit=6'>click</a>",
    "<style>body{display:none}</style>",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href='http://127.0.0.1:9/'>",
    "<object data='http://127.0.0.1:9/o'></object>",
    "<form action='http://127.0.0.1:9/'><button autofocus>go</button></form>",
    "<!-- <script> -->",
    "]]><script>window.hit=7</script>",
    "--></script><script>window.hit=8</script>",
    "{{7*7}} {{constructor.constructor('window.hit=9')()}}",
    "${window.hit=10} $policy $data $script",
    "<%= 7*7 %> #{7*7} {% raw %}",
    '"];window.hit=11;//',
    "'};window.hit=12;//",
    "\\u003cscript\\u003ewindow.hit=13\\u003c/script\\u003e",
    "\u202egnp.exe\u202c \u2066bidi\u2069 \u200f\u061c",
    "line\u2028separator\u2029paragraph",
    "&lt;script&gt;window.hit=14&lt;/script&gt; &amp; &#x3c;",
    "=HYPERLINK('http://127.0.0.1:9/','x')",
    "javascript:window.hit=15",
    "data:text/html,<script>window.hit=16</script>",
    "__proto__ constructor toString hasOwnProperty",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=17>",
    "\x7f\x1b[31mred\x1b[0m \u200b\ufeff zero width",
]
assert len(HOSTILE) == 30


def pool_rows(n: int, *, hostile: bool, seed: int = 0) -> list[dict[str, Any]]:
    """n rows in the messages dialect; with `hostile` the first 30 carry the payloads, also as their category."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [WORDS[k] for k in rng.integers(0, len(WORDS), size=int(rng.integers(6, 40)))]
        ask, answer = f"Question {i}: tell me about {words[0]} {words[1]}?", f"Answer {i}: " + " ".join(words)
        topic = ("travel", "cooking", "sums")[i % 3]
        if hostile and i < len(HOSTILE):
            ask, answer, topic = HOSTILE[i] + f" {i}", HOSTILE[i] + " " + answer, HOSTILE[i][:40] if i < 3 else topic
        rows.append(
            {"topic": topic, "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        )
    return rows


def method_columns(name: str, n_tokens: np.ndarray, topic: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Scores and parts of one method, shaped as the real ones are."""
    rng = np.random.default_rng(seed)
    n = len(n_tokens)
    if name == "davir":
        ini = n_tokens * rng.normal(2.2, 0.5, n).clip(0.3)
        ref = ini * rng.uniform(0.35, 1.05, n)
        return {"score": (ini - ref) / ini, "loss_ini": ini, "loss_ref": ref}
    if name in ("rose", "less"):
        tasks = {f"task.{t}": rng.normal(0.1 * (topic == t), 0.05, n) for t in ("travel", "sums", "support")}
        return {"score": np.max(list(tasks.values()), axis=0), **tasks}
    return {"score": rng.random(n)}


def make_run(
    folder: Path,
    n: int = 300,
    *,
    methods: tuple[str, ...] = ("rose", "davir", "random"),
    hostile: bool = False,
    kept: float = 0.1,
) -> Path:
    """Write a run folder with `n` rows under `folder` and return its path."""
    run = folder / "spring-pool"
    (run / "scores").mkdir(parents=True)
    pool_file = folder / "pool.jsonl"
    pool_file.write_text("".join(json.dumps(row) + "\n" for row in pool_rows(n, hostile=hostile)), encoding="utf-8")
    spec = {"path": str(pool_file), "category_column": "topic"}
    pool = load_pool([DataSpec(**spec)])
    topic = np.array(pool.table["category"].to_pylist(), dtype=object)
    n_tokens = np.array([len(pool.messages(i)[-1]["content"].split()) for i in range(len(pool))])
    source = np.array(["web" if i % 4 else "forum" for i in range(len(pool))], dtype=object)
    for k, name in enumerate(methods):
        columns = method_columns(name, n_tokens, topic, seed=k + 1)
        order = np.lexsort((pool.ids.astype(str), -columns["score"]))
        rank = np.empty(len(pool), dtype=np.int64)
        rank[order] = np.arange(1, len(pool) + 1)
        table = {"id": pool.ids, "source": source, "category": topic, "score": columns.pop("score"), "rank": rank,
                 "selected": rank <= max(1, int(kept * len(pool))), "n_tokens": n_tokens, **columns}  # fmt: skip
        arrow = pa.table({key: pa.array(value) for key, value in table.items()})
        arrow = arrow.replace_schema_metadata({"method": name, "length_unit": "tokens"})
        pq.write_table(arrow, run / "scores" / f"{LABELS.get(name, name)}.parquet")
    recipe = Recipe(
        pool=[spec], target=["pairs.jsonl"], methods=[m for m in methods if m != "random"], budget=f"{kept:.0%}"
    )
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude={"run_dir"}), sort_keys=False)
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    write_json(run / "comparison.json", comparison(methods, int(kept * n), f"{kept:.0%}"))
    evil = HOSTILE[1] if hostile else ""
    findings = [
        (
            "length",
            "warning",
            "rose",
            0.71,
            "The score follows the length of the answer. " + evil,
            "Hold it against `longest`.",
        ),
        ("near-copies", "info", "davir", 4, "Four kept rows are near copies of each other.", "Set select.dedup: near."),
    ]
    keys = ("name", "level", "method", "figure", "text", "advice")
    write_json(run / "findings.json", [dict(zip(keys, finding, strict=True)) for finding in findings])
    write_json(
        run / "manifest.json",
        {
            "keepset": "0.1.0",
            "date": "2026-11-22",
            "seed": 0,
            "device": "cpu" + evil,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "model": {"name": "demo", "files": {"model.safetensors": "ab" * 32}},
        },
    )
    with (run / "quarantine.jsonl").open("w", encoding="utf-8") as file:
        for line, reason in ((41, "empty-completion"), (91, "null-field"), (97, "null-field")):
            file.write(
                json.dumps(
                    {
                        "file": "data/pool.jsonl",
                        "line": line,
                        "reason": reason,
                        "detail": "the answer is missing",
                        "excerpt": '{"instruction": "How long do lentils cook?"' + evil,
                    }
                )
                + "\n"
            )
    costs = [
        {"stage": "warm-up", "seconds": 11.2, "rows": 12, "tokens": 803},
        {"stage": "influence", "seconds": 96.1, "rows": n, "tokens": 7727},
        {"stage": "train rose", "seconds": 41.0, "rows": 30, "tokens": 2201},
    ]
    (run / "costs.jsonl").write_text("".join(json.dumps(c) + "\n" for c in costs), encoding="utf-8")
    return run


def comparison(methods: tuple[str, ...], k: int, budget: str) -> dict[str, Any]:
    """A comparison as `compare` writes it: three random seeds, the longest rows and the base, at one budget."""
    rows: list[dict[str, Any]] = []

    def add(label: str, kind: str, value: float, seed: int | None = 0) -> None:
        metrics = {
            "loss.heldout": {"value": 3.1 - value, "low": 3.0 - value, "high": 3.2 - value, "n": 40, "level": 0.95},
            "accuracy.policy_mean": {"value": value, "low": value - 0.09, "high": value + 0.08, "n": 40, "level": 0.95},
        }
        size = (
            {"budget": None, "n_rows": 0, "n_tokens": 0}
            if kind == "base"
            else {"budget": budget, "n_rows": k, "n_tokens": k * 22}
        )
        rows.append({"label": label, "kind": kind, **size, "seed": seed, "metrics": metrics})

    for i, name in enumerate(m for m in methods if m != "random"):
        add(name, "method", 0.74 - 0.05 * i)
    for seed, value in enumerate((0.61, 0.58, 0.64)):
        add(f"random-{seed}", "random", value, seed)
    add("longest", "longest", 0.66)
    add("base", "base", 0.55, None)
    summary = []
    for row in rows:
        if row["label"] in ("random-1", "random-2"):
            continue
        test = {
            "difference": 0.13,
            "low": 0.02,
            "high": 0.24,
            "p": 0.018,
            "p_holm": 0.036,
            "n": 40,
            "win_tie_loss": [9, 27, 4],
        }
        metrics = {name: {**mean, "spread": 0.03 if row["kind"] == "random" else None}
                   for name, mean in row["metrics"].items()}  # fmt: skip
        summary.append({**row, "label": row["label"].removesuffix("-0"), "seeds": 3 if row["kind"] == "random" else 1,
                        "metrics": metrics, "cost": COST,
                        "vs_random": {"accuracy.policy_mean": test} if row["kind"] == "method" else {}})  # fmt: skip
    return whole_comparison(rows, summary)


COST = {"select_seconds": 96.0, "select_flops": 2e9, "train_seconds": 41.0, "train_flops": 1e9}


def whole_comparison(rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> dict[str, Any]:
    """`comparison.json` with these rows and entries, and nothing else to say."""
    selection = {"flops": 2e9, "tokens": 7727, "seconds": 96.0, "share": 0.5, "stages": []}
    return {"rows": rows, "summary": summary, "full_training_flops": 4e9, "selection": selection, "pareto": {},
            "loss_vs_performance": {"models": [], "epochs": []}}  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Write JSON as the run does."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def validation(
    labels: tuple[str, ...] = ("rose", "davir", "random-0"), left_out: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`validation.json` with halves that say little, one outcome that doesn't vary, tenths, and one row left out."""

    def mean(value: float | None, n: int = 60) -> dict[str, Any]:
        low, high = (None, None) if value is None else (value - 0.12, value + 0.11)
        return {"value": value, "low": low, "high": high, "n": n, "level": 0.95}

    outcomes = ("loss.target", "margin.implicit_mean.matched", "accuracy.policy_mean.matched")
    facts, scores = [], []
    for k, name in enumerate(outcomes):
        flat = name.startswith("accuracy")
        ceiling = None if flat else 0.81 - 0.1 * k
        facts.append({"name": name, "queries": 20, "spread": 0.01, "unit": "nats a token",
                      "between_seeds": mean(None if ceiling is None else ceiling**2, 12), "ceiling": ceiling,
                      "between_seeds_of_mean": mean(None if flat else 0.7, 12),
                      "ceiling_of_mean": None if flat else 0.84})  # fmt: skip
        for i, label in enumerate(labels):
            value = None if flat else (0.42 - 0.1 * k, 0.13, -0.02)[i % 3]
            of_mean = mean(None if value is None else value + 0.1)
            scores.append({"label": label, "outcome": name, "lds": mean(value), "of_mean": of_mean})
    halves = {"name": "halves", "models": 60, "again": 12, "kept": 100, "outcomes": facts, "scores": scores}
    tenths = {"label": labels[0], "outcome": "loss.target", "values": [2.0 + 0.01 * i for i in range(10)],
              "spearman": 0.94, "p": 0.0004, "seeds": 2}  # fmt: skip
    gone = [{"ids": [i], "worth": {"loss.target": 0.0021, "loss.chosen": -0.0003}} for i in left_out]
    return {"rows": 200, "tokens": 412_000, "seconds": 2520.0, "designs": [halves], "deciles": [tenths],
            "left_out": gone, "unscored": {}}  # fmt: skip
