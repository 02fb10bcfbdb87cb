"""`keepset train sft | dpo | reward` on files: trainer arguments go through, unknown ones are told."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from rich.console import Console
from typer.testing import CliRunner

from conftest import save_tiny
from keepset.cli import app
from keepset.data import load_pool
from keepset.errors import DataError, RecipeError
from keepset.pipeline.train import hold_out, parse_words, read_rows, sections

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model", initializer_range=0.1, max_position_embeddings=512)
    rng = np.random.default_rng(0)

    def filler():
        return "".join(rng.choice(list("abcd"), 3))

    pairs = [{"prompt": f"{i // 2}{filler()}", "chosen": f"{filler()} thing", "rejected": f"{filler()} user"}
             for i in range(24)]  # fmt: skip
    for i in range(0, 24, 2):
        pairs[i + 1]["prompt"] = pairs[i]["prompt"]
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs] + [{"prompt": "x", "completion": ""}]
    for name, some in (("pairs", pairs[:16]), ("held", pairs[16:]), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


def train(files, kind, data, out, *words, model=None):
    words = ["train", kind, "--data", f"{files}/{data}.jsonl", "--output_dir", str(out), *map(str, words)]
    return CliRunner().invoke(
        app, [*words, "--model_name_or_path", f"{model or files}/model", "--device", "cpu", "--json"]
    )


def facts_of(done):
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])


def test_words_become_sections():
    from trl import DPOConfig, SFTConfig

    given = parse_words(
        ["--learning_rate", "2e-5", "--max-length=128", "--full", "--lora_target_modules", "q_proj", "v_proj",
         "--weight_decay", "-1", "--save_strategy", "no", "--dtype", "bfloat16"]
    )  # fmt: skip
    assert given["learning_rate"] == 2e-5 and given["full"] is True and given["weight_decay"] == -1
    said = sections(given, SFTConfig)
    assert said.model.max_length == 128 and said.model.dtype == "bfloat16"
    assert said.lora.lora_target_modules == ["q_proj", "v_proj"] and said.train.learning_rate == 2e-5
    assert sections(parse_words(["--label_smoothing", "0.1"]), DPOConfig).train.extra == {"label_smoothing": 0.1}
    for words, message in [
        (["--learning_rat", "1"], r"--learning_rat: neither .* \(did you mean 'learning_rate'\?\)"),
        (["--label_smoothing", "1"], "--label_smoothing: neither keepset nor SFTConfig"),
        (["--lora_r", "x"], "--lora_r"),
        (["stray"], "'stray': write arguments as --name value"),
        (["--seed2=1", "--seed2", "2"], "--seed2 stands twice"),
    ]:
        with pytest.raises(RecipeError, match=message):
            sections(parse_words(words), SFTConfig)


def test_sft_on_a_file(files, tmp_path):
    words = ("--num_train_epochs", 2, "--learning_rate", "1e-2", "--lora_r", 4, "--eval_data", files / "held.jsonl")
    facts = facts_of(train(files, "sft", "rows", tmp_path / "m", *words))
    assert (
        facts["steps"] == 6
        and facts["heldout_after"]["token_mean"]["value"] < facts["heldout_before"]["token_mean"]["value"]
    )
    assert json.loads((tmp_path / "m/evaluation.json").read_text()) == facts
    assert [json.loads(line)["reason"] for line in open(tmp_path / "m/quarantine.jsonl")] == ["empty-completion"]
    changed = (tmp_path / "m/adapter_model.safetensors").stat().st_mtime_ns
    assert facts_of(train(files, "sft", "rows", tmp_path / "m", *words)) == facts
    assert (tmp_path / "m/adapter_model.safetensors").stat().st_mtime_ns == changed
    done = train(files, "sft", "rows", tmp_path / "n", "--learning_rat", 1)
    assert isinstance(done.exception, RecipeError) and not (tmp_path / "n").exists()


def test_weights_of_a_column_reach_the_rows_they_stand_beside(files, tmp_path):
    """The adapter is that of the trainer given the weights by hand, and not that of equal weights."""
    from safetensors.numpy import load_file

    from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
    from keepset.train.sft import train_sft
    from keepset.train.training import Training

    lines = [json.loads(t) for t in (files / "rows.jsonl").read_text().splitlines()[:8]]
    given = [0, 0.5, 1, 2, 0, 3, 1, 0.25]
    rows = [{**r, "weight": w} for r, w in zip(lines, given, strict=True)]
    rows += [{"prompt": "q", "completion": "a", "weight": w} for w in (-1, None, "much", True, "inf")]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ("--num_train_epochs", 1, "--learning_rate", "1e-2", "--lora_r", 2, "--warmup_ratio", 0)
    facts = facts_of(train(tmp_path, "sft", "some", tmp_path / "out", *words, "--weight_column", "weight",
                           model=files))  # fmt: skip
    assert facts["steps"] == 1
    refused = [json.loads(t) for t in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(r["reason"], r["line"]) for r in refused] == [("bad-weight", k) for k in range(9, 14)]

    spec = ModelSpec(model_name_or_path=f"{files}/model", device="cpu")
    console = Console(quiet=True)
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    read = read_rows([f"{tmp_path}/plain.jsonl"], spec, console, pairs=False)
    pool = load_pool(f"{tmp_path}/plain.jsonl")
    order = np.argsort(pool.ids.astype(str), kind="stable")
    weights = [float(given[i]) for i in order]
    args = TrainSpec(num_train_epochs=1, learning_rate=1e-2, warmup_ratio=0)
    for name, some in (("by-hand", weights), ("equal", None)):
        train_sft(
            Training(spec, LoraSpec(lora_r=2), args, 0, weights=some), [r[0] for r in read.sides], tmp_path / name
        )
    made, same, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "by-hand", "equal"))
    assert all(np.array_equal(made[k], same[k]) for k in made)
    assert any(not np.array_equal(made[k], other[k]) for k in made)


def test_a_weight_column_that_is_not_there_is_named(files, tmp_path):
    done = train(files, "sft", "rows", tmp_path, "--weight_column", "wieght")
    assert isinstance(done.exception, DataError) and "weight_column 'wieght' is no column of the data" in str(
        done.exception
    )


@pytest.mark.parametrize("loss", ["davir", "hinge"])
def test_dpo_on_a_file(files, tmp_path, loss):
    words = ("--loss", loss, "--learning_rate", "1e-2", "--eval_data", files / "held.jsonl", "--logging_steps", 2)
    facts = facts_of(train(files, "dpo", "pairs", tmp_path / "m", *words, "--num_train_epochs", 3))
    assert facts["beta"] == (5 if loss == "davir" else 0.1) and facts["steps"] == 6
    assert facts["preference_after"]["all"]["implicit_sum"]["accuracy"]["value"] > 0.5
    assert "implicit_sum" not in facts["preference_before"]["all"]
    done = train(files, "dpo", "pairs", tmp_path / "n", "--loss", "exo_pair")
    assert isinstance(done.exception, RecipeError) and "Label smoothing must be" in str(done.exception)


def test_reward_holds_out_prompts_and_tells_its_accuracy(files, tmp_path):
    from rich.console import Console

    from keepset.recipe import ModelSpec

    facts = facts_of(train(files, "reward", "pairs", tmp_path / "r", "--heldout_share", 0.25, "--num_train_epochs", 1))
    assert facts["heldout"]["n"] == 4 and json.loads((tmp_path / "r/heldout.json").read_text()) == facts["heldout"]
    spec = ModelSpec(model_name_or_path=f"{files}/model")
    rows = read_rows([f"{files}/pairs.jsonl"], spec, Console(quiet=True), pairs=True)
    kept, held = hold_out(rows, 0.25, 0)
    prompts = {id(side): p for p, row in zip(rows.prompts, rows.sides, strict=True) for side in row}
    assert len(kept) == 12 and {prompts[id(p[0])] for p in kept}.isdisjoint(prompts[id(p[0])] for p in held)
    done = CliRunner().invoke(app, ["train", "reward", "--data", f"{files}/pairs.jsonl", "--output_dir",
                                    str(tmp_path / "r"), "--model_name_or_path", f"{files}/model", "--device", "cpu",
                                    "--heldout_share", "0.25", "--num_train_epochs", "1"])  # fmt: skip
    assert "judge's accuracy on 4 held-out pairs: " in done.stdout


def test_a_subset_needs_no_command_word(tmp_path):
    done = CliRunner().invoke(app, ["train", "davir", "--run_dir", str(tmp_path / "none")])
    assert "is no run folder yet" in str(done.exception)


def test_the_shipped_fsdp_config_is_one(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    done = CliRunner().invoke(app, ["init", str(tmp_path / "fsdp.yaml"), "--accelerate"])
    assert done.exit_code == 0 and "accelerate launch" in done.stdout
    config = load_config_from_file(str(tmp_path / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
