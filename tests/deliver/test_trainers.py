"""The hand-over: TRL's config trains a tiny model on keepset's own tokens; the others know their trainers' keys."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from conftest import CHATML, tiny_model, tiny_tokenizer
from keepset.cli.options import open_job
from keepset.deliver.trainers import _Model, write_trainers
from keepset.pipeline.choose import Subset, full_subset
from keepset.recipe import ModelSpec, parse_recipe
from keepset.stages.job import Job

TURN = [{"role": "user", "content": "the thing"}, {"role": "assistant", "content": "the answer is the thing"}]
POOLS = {
    "single": [{"messages": [{"role": "user", "content": f"q{i} the user"}, TURN[1]]} for i in range(5)],
    "multi": [{"messages": [*TURN, {"role": "user", "content": f"and {i}"}, TURN[1]]} for i in range(5)],
    "context": [
        {"messages": [TURN[0], {**TURN[1], "weight": 0}, {"role": "user", "content": f"and {i}"}, TURN[1]]}
        for i in range(5)
    ],
    "text": [{"text": f"the answer is {i} things"} for i in range(5)],
}

# Names of axolotl 0.19's AxolotlInputConfig (and of its dataset section) and of llamafactory 0.9.5's five argument
# classes, as far as the configs use them; read from the packages, which are too heavy for this suite.
AXOLOTL = """base_model revision_of_model trust_remote_code attn_implementation datasets chat_template
chat_template_jinja train_on_inputs sequence_len sample_packing adapter lora_r lora_alpha lora_dropout
lora_target_linear lora_target_modules num_epochs micro_batch_size gradient_accumulation_steps learning_rate
lr_scheduler warmup_ratio optimizer weight_decay max_grad_norm bf16 fp16 gradient_checkpointing val_set_size
logging_steps saves_per_epoch seed
output_dir""".split()
AXOLOTL_DATA = """path ds_type type field field_messages message_property_mappings message_field_training roles_to_train
train_on_eos""".split()
LLAMAFACTORY = """model_name_or_path model_revision trust_remote_code stage do_train dataset dataset_dir cutoff_len
mask_history finetuning_type lora_rank lora_alpha lora_dropout lora_target num_train_epochs learning_rate
per_device_train_batch_size gradient_accumulation_steps weight_decay max_grad_norm warmup_steps lr_scheduler_type bf16
fp16 disable_gradient_checkpointing logging_steps save_strategy report_to seed output_dir""".split()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    # with the generation prompt, and marked as TRL marks the templates it knows
    content = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    marked = (
        "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}" + content + "{% endif %}"
    )
    assert content in CHATML
    tiny_tokenizer(CHATML.replace(content, marked)).save_pretrained(folder)
    return folder


def handed_over(model_folder, folder: Path, pool: str, **more) -> tuple[Job, dict[str, dict]]:
    for name in pool.split("+"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in POOLS[name]))
    spec = {"model_name_or_path": str(model_folder), "max_length": 128, "device": "cpu", **more.pop("model", {})}
    recipe = {
        "run_dir": str(folder / "run"),
        "pool": [str(folder / f"{name}.jsonl") for name in pool.split("+")],
        "methods": ["random"],
        "model": spec,
        "lora": {"lora_r": 2, "lora_alpha": 4},
        "train": {"num_train_epochs": 1},
        **more,
    }
    job = Job(parse_recipe(recipe), console=Console(file=io.StringIO(), width=200))
    written = write_trainers(job, full_subset(job))
    configs = {Path(n).stem: yaml.safe_load((job.run.path / n).read_text()) for n in written if n.endswith(".yaml")}
    return job, configs


TRL = """
import sys, json, os, shlex, torch
torch.set_num_threads(1)
from trl import SFTTrainer
from trl.scripts.sft import main, make_parser
own = SFTTrainer.train
def train(self, **more):
    batch = self.data_collator([self.train_dataset[i] for i in range(len(self.train_dataset))])
    rows = [(i[m.bool()].tolist(), l[m.bool()].tolist()) for i, l, m in
            zip(batch['input_ids'], batch['labels'], batch['attention_mask'])]
    json.dump(rows, open('seen.json', 'w'))
    return own(self, **more)
SFTTrainer.train = train
for readme in sys.argv[1:]:
    os.chdir(shlex.split(open(readme).read().split('`')[1])[1])  # `cd FOLDER`
    main(*make_parser().parse_args_and_config(['--config', 'trainers/trl_sft.yaml']))
"""


def test_the_trl_config_trains_on_the_very_tokens_keepset_scored(model_folder, tmp_path, monkeypatch):
    """`trl sft --config` run to its end on four kinds of rows; the rows it trains on are looked at on the way.

    The recipe names model, template and pool by relative paths, and the commands are run from another folder.
    """
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    Path("model").symlink_to(model_folder)
    template = AutoTokenizer.from_pretrained(model_folder).chat_template
    Path("own.jinja").write_text(template)
    jobs = {}
    for pool in ("single", "multi", "context", "text"):
        Path(pool).mkdir()
        own = {"chat_template": "own.jinja"} if pool == "multi" else {}
        jobs[pool], configs = handed_over("model", Path(pool), pool, model=own)
        assert ("chat_template_path" in configs["trl_sft"]) == (pool == "multi")
        assert configs["trl_sft"].get("assistant_only_loss") == (True if pool == "multi" else None)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    readmes = [str((job.run.path / "trainers/README.md").absolute()) for job in jobs.values()]
    done = subprocess.run(
        [sys.executable, "-c", TRL, *readmes], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for pool, job in jobs.items():
        assert (job.run.path / "trainers/out-trl/adapter_model.safetensors").exists()
        rows = json.loads((job.run.path / "seen.json").read_text())
        assert len(rows) == len(job.rows)
        for (ids, labels), own in zip(rows, job.rows, strict=True):
            assert ids == own.input_ids.tolist()
            supervised = np.array([label != -100 for label in labels])
            if pool == "text":  # TRL counts the first token too; nothing predicts it
                supervised[0] = False
            assert not (own.supervised & ~supervised).any()
            # the line break behind the last end of turn is the template's, and TRL trains it with a completion
            assert np.flatnonzero(supervised & ~own.supervised).tolist() in ([], [len(ids) - 1])


def test_the_last_turn_alone(model_folder, tmp_path):
    job, configs = handed_over(model_folder, tmp_path, "multi", model={"supervise": "last"})
    row = json.loads((job.run.path / "trainers/trl.jsonl").read_text().splitlines()[0])
    assert len(row["prompt"]) == 3 and row["completion"] == [TURN[1]]
    flags = json.loads((job.run.path / "trainers/rows.jsonl").read_text().splitlines()[0])["messages"]
    assert [m["train"] for m in flags] == [False, False, False, True]
    data = configs["axolotl"]["datasets"][0]
    assert data["roles_to_train"] == [] and data["message_field_training"] == "train"
    assert configs["llamafactory"]["mask_history"] is True


def test_answers_that_are_context(model_folder, tmp_path):
    """Before a last answer they are what `supervise: last` leaves out; elsewhere no trainer but axolotl can follow."""
    job, configs = handed_over(model_folder, tmp_path, "context")
    row = json.loads((job.run.path / "trainers/trl.jsonl").read_text().splitlines()[0])
    assert len(row["prompt"]) == 3 and row["completion"] == [TURN[1]]
    flags = json.loads((job.run.path / "trainers/rows.jsonl").read_text().splitlines()[0])["messages"]
    assert [m["train"] for m in flags] == [False, False, False, True]
    assert configs["axolotl"]["datasets"][0]["message_field_training"] == "train"
    assert configs["llamafactory"]["mask_history"] is True
    (tmp_path / "both").mkdir()
    job, configs = handed_over(model_folder, tmp_path / "both", "context+multi")
    assert not configs and not (job.run.path / "trainers").exists()
    assert "not trained on" in job.console.file.getvalue()


@pytest.mark.parametrize("pool", ["single", "text"])
@pytest.mark.parametrize("full", [False, True])
def test_axolotl_and_llamafactory_know_every_key(model_folder, tmp_path, pool, full):
    job, configs = handed_over(
        model_folder, tmp_path, pool, train={"full": full, "num_train_epochs": 2, "learning_rate": 3e-5}
    )
    axolotl, factory = configs["axolotl"], configs["llamafactory"]
    assert set(axolotl) <= set(AXOLOTL) and set(axolotl["datasets"][0]) <= set(AXOLOTL_DATA)
    assert set(factory) <= set(LLAMAFACTORY)
    assert axolotl["num_epochs"] == factory["num_train_epochs"] == configs["trl_sft"]["num_train_epochs"] == 2
    assert axolotl["learning_rate"] == factory["learning_rate"] == configs["trl_sft"]["learning_rate"] == 3e-5
    assert factory["finetuning_type"] == ("full" if full else "lora")
    assert ("lora_r" in axolotl) == ("lora_r" in configs["trl_sft"]) == (not full)
    assert type(factory.get("lora_alpha", 4)) is type(axolotl.get("lora_alpha", 4)) is int
    assert factory["warmup_steps"] == 1  # 5 rows, batches of 8, 2 epochs: 3 % of 2 steps, rounded up
    entry = json.loads((job.run.path / "trainers/dataset_info.json").read_text())["keepset"]
    rows = [json.loads(line) for line in (job.run.path / "trainers/rows.jsonl").read_text().splitlines()]
    assert rows == POOLS[pool]
    assert entry["columns"] == ({"prompt": "text"} if pool == "text" else {"messages": "messages"})


def test_a_template_that_is_not_the_tokenizers_is_handed_over(model_folder, tmp_path):
    job, configs = handed_over(model_folder, tmp_path, "single", model={"chat_template": "plain"})
    assert configs["trl_sft"]["chat_template_path"] == configs["axolotl"]["chat_template_jinja"]
    text = (job.run.path / "trainers/chat_template.jinja").read_text()
    rendered = job.encoder.tokenizer.apply_chat_template(TURN[:1], chat_template=text, tokenize=False,
                                                         add_generation_prompt=True)  # fmt: skip
    assert rendered.endswith("User: the thing\n\nAssistant: ")
    assert "chat_template.jinja" in (job.run.path / "trainers/README.md").read_text()


def test_text_mixed_with_chats_is_said_and_not_written(model_folder, tmp_path):
    job, configs = handed_over(model_folder, tmp_path, "single+text")
    assert not configs and not (job.run.path / "trainers").exists()
    assert "mixes plain text with chats" in job.console.file.getvalue()


def test_a_run_hands_its_first_method_over(tmp_path, model_folder):
    job, _ = handed_over(model_folder, tmp_path, "single")
    some = Subset("rose", "rose", "method", "2", np.array([3, 1]), 10)
    assert "trainers/axolotl.yaml" in write_trainers(job, some)
    rows = [json.loads(line) for line in (job.run.path / "trainers/rows.jsonl").read_text().splitlines()]
    assert rows == [POOLS["single"][3], POOLS["single"][1]]


def test_paths_hold_from_the_run_folder_and_hub_names_stay(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/mine").symlink_to(model_folder)  # as a hub name would look
    Path("ds.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    extra = {"deepspeed": "ds.json", "fsdp_config": {"x": 1}, "hub_model_id": "models/mine"}
    job, configs = handed_over("models/mine", Path("."), "single", run_dir="runs/x", train={"extra": extra})
    for name, key in (
        ("trl_sft", "model_name_or_path"),
        ("axolotl", "base_model"),
        ("llamafactory", "model_name_or_path"),
    ):
        assert configs[name][key] == str(tmp_path / "models/mine")
    assert configs["trl_sft"]["deepspeed"] == str(tmp_path / "ds.json")
    assert {k: configs["trl_sft"][k] for k in ("fsdp_config", "hub_model_id")} == {k: extra[k] for k in list(extra)[1:]}
    monkeypatch.chdir("runs/x")  # what is relative is so to the run folder
    assert Path(configs["trl_sft"]["datasets"][0]["data_files"][0]).is_file()
    assert Path(configs["axolotl"]["datasets"][0]["path"]).is_file()
    assert (Path(configs["llamafactory"]["dataset_dir"]) / "dataset_info.json").is_file()
    assert _Model(ModelSpec(model_name_or_path="owner/name"), None).path == "owner/name"
    before = (tmp_path / "runs/x/trainers/trl_sft.yaml").read_bytes()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run folder knows where it was started
    again = open_job(Path("../runs/x"))
    write_trainers(again, full_subset(again))
    assert (tmp_path / "runs/x/trainers/trl_sft.yaml").read_bytes() == before
