"""`keepset generate`, `judge`, `pairs` and `lm-eval` on files; a judge is shown with its accuracy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from conftest import save_tiny  # noqa: E402
from keepset.cli import app  # noqa: E402
from keepset.judging.judge import Judgements  # noqa: E402
from keepset.judging.rank import rank_by_comparison  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, a reward model that likes the word `thing`, and answers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("judge")
    save_tiny(folder / "model", initializer_range=0.1, max_position_embeddings=512)
    rng = np.random.default_rng(0)
    liked = [{"prompt": f"{i}", "chosen": f"{''.join(rng.choice(list('abcd'), 3))} thing",
              "rejected": f"{''.join(rng.choice(list('abcd'), 3))} user"} for i in range(30)]  # fmt: skip
    lines(folder / "liked.jsonl", liked)
    run(0, "train", "reward", "--data", folder / "liked.jsonl", "--output_dir", folder / "reward", "--device", "cpu",
        "--model_name_or_path", folder / "model", "--num_train_epochs", 8, "--learning_rate", "1e-2")  # fmt: skip
    yield folder
    torch.set_num_threads(before)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(code, *words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_win_rate_with_the_judges_accuracy(files, tmp_path):
    def outputs(name, word, extra=0):
        rows = [{"instruction": f"{i}", "output": f"ab {word}", "generator": name} for i in range(10 + extra)]
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    ours, theirs = outputs("ours.json", "thing", 2), outputs("theirs.json", "user")
    facts = json.loads(run(0, "judge", ours, theirs, "--reward", files / "reward", "--json"))
    assert facts["compared"] == 10 and facts["unshared"] == 2
    assert facts["raw"]["value"] == 1 and facts["judge_heldout"]["n"] == 6
    assert "judge's accuracy on 6 held-out pairs: 1.000" in run(0, "judge", ours, theirs, "--reward", files / "reward")
    (files / "reward/heldout.json").rename(tmp_path / "away")
    shown = run(0, "judge", ours, theirs, "--reward", files / "reward")
    assert "judge's accuracy on held-out pairs: not measured" in shown
    (tmp_path / "away").rename(files / "reward/heldout.json")
    done = CliRunner().invoke(app, ["judge", str(ours), str(theirs)])
    assert "name a judge: --reward FOLDER" in str(done.exception)


def test_pairs_of_scored_answers(tmp_path):
    scored = [("p", "good", 9), ("p", "bad!", 3), ("p", "middle", 5), ("q", "x", 4), ("q", "y", 3), ("r", "alone", 1)]
    rows = [{"prompt": p, "answer": a, "score": s} for p, a, s in scored]
    data, out = lines(tmp_path / "a.jsonl", rows), tmp_path / "pairs.jsonl"
    shown = run(0, "pairs", data, "--out", out, "--min_ratio", 3)
    assert "3 prompts = 1 pairs + 2 left out" in shown and "ratio 1" in shown and "one-answer 1" in shown
    (pair,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (pair["chosen"], pair["rejected"]) == ("good", "bad!")
    done = CliRunner().invoke(app, ["pairs", str(data), "--out", str(out), "--score", "votes"])
    assert "a row without 'votes'; name the columns" in str(done.exception)


def test_pairs_of_generated_answers_that_a_judge_ranks(files, tmp_path):
    prompts = lines(tmp_path / "p.jsonl", [{"instruction": "a", "input": "b"}, {"prompt": "c"}, {"prompt": "c"}])
    words = ("--model_name_or_path", files / "model", "--max_new_tokens", 4)
    run(0, "generate", prompts, "--out", tmp_path / "model_outputs.json", *words)
    found = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [r["instruction"] for r in found] == ["a\nb", "c"] and set(found[0]) == {
        "instruction",
        "output",
        "generator",
    }
    run(0, "generate", prompts, "--out", tmp_path / "many.jsonl", "--n", 3, *words)
    many = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert len(many) == 6 and len({r["answer"] for r in many}) > 2  # sampled, not the same thrice
    answers = lines(tmp_path / "a.jsonl", [{"prompt": "z", "answer": a} for a in ("ab user", "ab thing", "abc")])
    shown = run(0, "pairs", answers, "--out", tmp_path / "pairs.jsonl", "--reward", files / "reward")
    pair = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert pair["chosen"] == "ab thing" and pair["chosen_score"] > pair["rejected_score"]
    assert "judge's accuracy on 6 held-out pairs" in shown


def test_ranking_by_comparisons_is_the_mean_preference():
    class Longest:
        def compare(self, items):
            values = [np.nan if "?" in i.answer + i.baseline else float(len(i.answer) > len(i.baseline)) for i in items]
            return Judgements(np.array(values), np.stack([values, values], axis=1))

    (ranked, odd), _ = rank_by_comparison(Longest(), ["p", "q"], [["a", "ccc", "bb"], ["?", "x"]])
    assert ranked.scores == [0, 1, 0.5] and np.isnan(odd.scores).all()


def test_lm_eval_task_and_commands(files, tmp_path):
    pool = lines(tmp_path / "pool.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(4)])
    recipe = {"run_dir": str(tmp_path / "run"), "pool": str(pool), "methods": ["random"], "budget": 2,
              "model": {"model_name_or_path": str(files / "model"), "device": "cpu"},
              "evaluate": {"pairs": [{"path": str(files / "liked.jsonl"), "limit": 5}]},
              "controls": {"random_seeds": [], "longest": False}, "train": {"num_train_epochs": 1}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(0, "run", tmp_path / "recipe.yaml", "-q")
    shown = run(0, "lm-eval", "--run_dir", tmp_path / "run", "--tasks", "gsm8k").splitlines()
    assert len(shown) == 2 and all("--tasks keepset_pairs,gsm8k" in line for line in shown)
    assert f"peft={tmp_path}/run/models/random-seed0" in shown[1]
    task = yaml.safe_load((tmp_path / "run/lm-eval/keepset_pairs.yaml").read_text())
    docs = [json.loads(line) for line in open(task["dataset_kwargs"]["data_files"]["test"])]
    assert len(docs) == 5 and docs[0]["context"].endswith("<|im_start|>assistant\n")
    assert docs[0]["chosen"].endswith(" thing<|im_end|>")
