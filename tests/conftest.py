"""Tiny models, a byte-level tokenizer with a ChatML template and random rows: what most tests start from."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from lean import lean
from tiny_recipe import write_lines

if TYPE_CHECKING:  # torch and transformers only where a test asks for a model
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

sys.modules.setdefault("conftest", sys.modules[__name__])  # pytest calls it tests.conftest; it is made once

# a busy machine is no bug: a property may take its time
# The default suite draws the same examples every time; HYPOTHESIS_RANDOM=1 draws new ones.
settings.register_profile("keepset", deadline=None, derandomize="HYPOTHESIS_RANDOM" not in os.environ)
settings.load_profile("keepset")

ARCHITECTURES = ["llama", "gemma3", "gpt2", "qwen2", "qwen3", "mistral"]
VOCABULARY = 320
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_imported = 0


def pytest_runtest_teardown() -> None:
    """Once heavy packages have come in, see to it that they cost less."""
    global _imported
    if len(sys.modules) > _imported + 100:
        lean()
        _imported = len(sys.modules)


@dataclass(frozen=True)
class TinyRow:
    """Has the fields of `keepset.model.encode.Encoded`."""

    input_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool = False


def random_rows(n: int, *, seed: int = 0, shortest: int = 3, longest: int = 24, prefix: int = 0) -> list[TinyRow]:
    """Random token rows; a random share of the later tokens is supervised, at least one. `prefix` tokens are common."""
    rng = np.random.default_rng(seed)
    common = rng.integers(3, VOCABULARY, prefix)
    rows = []
    for _ in range(n):
        length = int(rng.integers(shortest, longest + 1))
        ids = np.concatenate([common, rng.integers(3, VOCABULARY, length)]).astype(np.int32)
        supervised = rng.random(len(ids)) < 0.6
        supervised[: max(1, prefix)] = False
        supervised[-1] = True
        rows.append(TinyRow(ids, supervised))
    return rows


def tiny_model(architecture: str = "llama", *, seed: int = 0, attn: str = "keepset", **changes: Any) -> PreTrainedModel:
    """A 2-layer float32 model of about 50k parameters with fixed random weights, in eval mode.

    Weights are larger than the usual 0.02 so that attention and the window really change the numbers.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    if attn == "keepset":
        import keepset.model.attention  # noqa: F401 - registers the name
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    if architecture == "gpt2":
        dropped = ("num_key_value_heads", "head_dim", "intermediate_size")
        config = GPT2Config(**{**{k: v for k, v in common.items() if k not in dropped}, **changes})
    elif architecture == "gemma3":  # layer 0 slides over 6 tokens, layer 1 sees all
        layers = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        config = Gemma3TextConfig(**{**common, "query_pre_attn_scalar": 8, **layers, **changes})
    elif architecture == "mistral":
        config = MistralConfig(**{**common, "sliding_window": 6, **changes})
    else:
        kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
        config = kinds[architecture](**{**common, **changes})
    torch.set_num_threads(1)  # threads cost more than they bring at this size, and far more on a busy machine
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    return model.eval()


def tiny_lora(model: Any, *, seed: int = 1, r: int = 4) -> Any:
    """Wrap a tiny model in a LoRA whose B is random too, so that the adapter changes the numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2")
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return peft.eval()


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens, trained in process; pad = eos, like SmolLM2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["user assistant system You are a helpful AI assistant", "the answer is the thing that the user wants\n\n"]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


def save_tiny(folder: Path, architecture: str = "llama", **changes: Any) -> None:
    """Write a tiny model and its tokenizer as a user's model folder."""
    tiny_model(architecture, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models train quicker on one thread, and beside others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def watch_trainers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Called with a callback of transformers' trainer, which every trainer that is made from then on has."""
    from transformers import Trainer

    made = Trainer.__init__

    def watch(callback: Any) -> None:
        def init(trainer: Any, *args: Any, **options: Any) -> None:
            made(trainer, *args, **options)
            trainer.add_callback(callback)

        monkeypatch.setattr(Trainer, "__init__", init)

    return watch


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    """One tiny model of every architecture in turn."""
    return tiny_model(architecture)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, max_position_embeddings=512)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.5, **sizes)
    BertModel(config).eval().save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 pool rows (one without an answer, one far too long), target pairs of two tasks, held-out pairs and rows."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "answer", "is", "user", "thing", "wants", "helpful", "assistant", "that"]

    def text(n):
        return " ".join(rng.choice(words, n))

    pool = [{"instruction": f"q{i} {text(3)}", "input": "", "output": text(2 + i % 7)} for i in range(22)]
    pool += [
        {"instruction": "none", "input": "", "output": ""},
        {"instruction": "long", "input": "", "output": text(400)},
    ]
    pairs = [
        {"task": "ab"[i % 2], "prompt": f"p{i} {text(2)}", "chosen": text(4 + i % 2), "rejected": text(4)}
        for i in range(12)
    ]
    return {
        "pool": write_lines(folder / "pool.jsonl", pool),
        "target": write_lines(folder / "target.jsonl", pairs[:6]),
        "pairs": write_lines(folder / "pairs.jsonl", pairs[6:]),
        "rows": write_lines(folder / "rows.jsonl", [{"prompt": text(3), "completion": text(5)} for _ in range(4)]),
    }


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A warm process that runs a tiny recipe in forks, to be killed (`crash.py`)."""
    pytest.importorskip("trl")
    from crash import TinyRun

    made = TinyRun(tmp_path_factory.mktemp("tiny_run"))
    yield made
    made.server.close()


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ROSE, DavIR and BM25 on twelve rows with a tiny model: two checkpoints, all models trained."""
    import io
    import json

    from rich.console import Console

    from keepset.pipeline import run_recipe
    from keepset.recipe import parse_recipe

    folder = tmp_path_factory.mktemp("small")
    save_tiny(folder / "model", max_position_embeddings=512)
    rows = [{"instruction": f"q{i} the user", "output": "the answer is " + "thing " * (i % 4 + 1)} for i in range(12)]
    pairs = [{"task": "ab"[i % 2], "prompt": f"p{i}", "chosen": "the answer" + " is" * i, "rejected": "the thing"}
             for i in range(5)]  # fmt: skip
    for name, some in (("pool", rows), ("target", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    train = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    recipe = {
        "run_dir": str(folder / "first"),
        "model": {"model_name_or_path": str(folder / "model"), "max_length": 128},
        "lora": {"lora_r": 2, "lora_alpha": 4},
        "pool": str(folder / "pool.jsonl"),
        "target": str(folder / "target.jsonl"),
        "methods": ["davir", "rose", "bm25"],
        "budget": 3,
        "warmup": {**train, "num_train_epochs": 2},
        "reference": train,
        "train": train,
        "evaluate": {"pairs": [{"path": str(folder / "target.jsonl")}], "bootstrap": 100},
        "controls": {"random_seeds": [0], "longest": False},
    }
    run_recipe(parse_recipe(recipe), console=Console(file=io.StringIO()), out=Console(file=io.StringIO()))
    return folder / "first"
