"""A reward model trained here, so that a judge exists offline: TRL's RewardTrainer on preference pairs.

Bradley-Terry: loss = −log σ(r(x, chosen) − r(x, rejected)), r being one number read off the last token. Its accuracy on
held-out pairs comes back with it and belongs beside every verdict it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.errors import DataError, ModelError
from keepset.evaluate.preference import correct, length_matched
from keepset.evaluate.reward import reward_scores
from keepset.evaluate.statistics import bootstrap_ci
from keepset.model.load import load_adapter, load_tokenizer, lora_config, one_line, pick_device, resolve
from keepset.model.weights import read
from keepset.recipe import LoraSpec, ModelSpec
from keepset.runfolder import layout
from keepset.runfolder.files import json_text, write_atomic
from keepset.train.arguments import trainer_config
from keepset.train.packed import Quiet
from keepset.train.run import finished, run_trainer
from keepset.train.training import Base, Training, TrainResult

if TYPE_CHECKING:
    from keepset.model.encode import Encoded

    Pair = tuple[Encoded, Encoded]


NEW_HEAD = r"^(score|classifier)\."
"""What a base model has no weights for: the head with one number (of Llama-like models, of GPT-NeoX ...)."""


@dataclass(frozen=True)
class RewardResult:
    """A trained reward model.

    Attributes:
        train: what training gave.
        heldout: see `pair_accuracy`; None without held-out pairs.
    """

    train: TrainResult
    heldout: dict[str, Any] | None


def train_reward(training: Training, pairs: Sequence[Pair], out: Path, *, heldout: Sequence[Pair] = ()) -> RewardResult:
    """Put a one-number head on the base and train it on pairs; LoRA and head, or all weights with `args.full`.

    Pairs of `heldout` are not trained on; `heldout.json` in `out` holds the accuracy on them.

    Raises:
        DataError: no pairs, a pair that stands in both lists, or a loss that became NaN.
        RecipeError: see `trainer_config`.
    """
    if not pairs:
        raise DataError("no pairs to train a reward model on")
    trained_on = {_key(p) for p in pairs}
    both = sum(_key(p) in trained_on for p in heldout)
    if both:
        raise DataError(f"{both} of {len(heldout)} held-out pairs are training pairs; remove them")
    result = _train(training, pairs, out)
    accuracy = None
    if heldout:
        model, _ = load_reward(training.model, out)
        accuracy = pair_accuracy(model, heldout, seed=training.seed)
        write_atomic(out / layout.REWARD_HELDOUT, json_text(accuracy, indent=1).encode())
    return RewardResult(result, accuracy)


def _train(training: Training, pairs: Sequence[Pair], out: Path) -> TrainResult:
    from datasets import Dataset
    from trl import RewardConfig

    base = Base.of(training.model, lambda: reward_model(training.model, training.seed))
    plan = training.plan([one for pair in pairs for one in pair], base.weights, "reward")
    done = finished(out, plan) if training.resume else None
    if done is not None:
        return done
    config: Any = trainer_config(RewardConfig, training, out)
    columns = {
        "chosen_ids": [np.asarray(c.input_ids).tolist() for c, _ in pairs],
        "rejected_ids": [np.asarray(r.input_ids).tolist() for _, r in pairs],
    }
    model, tokenizer = base.load()
    lora = None if training.args.full else training.lora
    trainer = reward_trainer(model, tokenizer, config, Dataset.from_dict(columns), lora)
    return run_trainer(training, trainer, tokenizer, out, plan)


def reward_model(spec: ModelSpec, seed: int, folder: str | None = None) -> tuple[Any, Any]:
    """Load the base (or the model in `folder`) with a one-number head; a new head is drawn with `seed`.

    Returns the model, in eval mode, and its tokenizer.

    Raises:
        ModelError: the architecture has no sequence-classification form, or weights are missing or left over.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    source = folder or resolve(spec)
    named = spec if folder is None else spec.model_copy(update={"model_name_or_path": folder})
    tokenizer = load_tokenizer(named, causal=False)
    made: dict[str, Any] = {} if folder else {"drawn": NEW_HEAD, "spare": lambda model, name: name == "lm_head.weight"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with one_line(source):
                model: Any = read(
                    AutoModelForSequenceClassification, source, num_labels=1, revision=spec.model_revision, **made,
                    dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code, use_safetensors=True,
                )  # fmt: skip
        except ModelError as error:
            raise ModelError(f"no reward model can be made of it: {error}") from None
    # transformers reads a row's reward at its last token that is not this one.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.to(pick_device(spec.device)).eval(), tokenizer


def reward_trainer(model: Any, tokenizer: Any, config: Any, data: Any, lora: LoraSpec | None) -> Any:
    """Make the trainer."""
    from peft import TaskType
    from trl import RewardTrainer

    class QuietReward(Quiet, RewardTrainer):
        pass

    more: dict[str, Any] = {}
    if lora is not None:
        peft_config = lora_config(lora, model)
        peft_config.task_type = TaskType.SEQ_CLS
        peft_config.modules_to_save = ["score"]
        more["peft_config"] = peft_config
    return QuietReward(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)


def load_reward(spec: ModelSpec, path: Path) -> tuple[Any, Any]:
    """Load what `train_reward` wrote: the reward model in eval mode and its tokenizer.

    Raises:
        ModelError: nothing of the kind there.
    """
    if (path / "adapter_model.safetensors").exists():
        model, tokenizer = reward_model(spec, 0)
        adapted = load_adapter(model, path)
        if not any("modules_to_save" in name for name, _ in adapted.named_parameters()):
            raise ModelError(f"{path}: the adapter has no reward head of its own, so its rewards would be random")
        return adapted, tokenizer
    if (path / "model.safetensors").exists():
        return reward_model(spec, 0, str(path))
    raise ModelError(f"{path}: no reward model (adapter_model.safetensors or model.safetensors) in this folder")


def pair_accuracy(model: Any, pairs: Sequence[Pair], *, seed: int = 0) -> dict[str, Any]:
    """Share of pairs whose chosen side gets the higher reward, with bootstrap 95 % intervals; a tie is one half.

    Returns:
        JSON-able: `n`, `accuracy`, `n_length_matched`, `accuracy_length_matched` (None without such pairs), `margin`
        (mean reward difference), `longer` (accuracy of always naming the longer side, for comparison).
    """
    scores = reward_scores(model, [one.input_ids for pair in pairs for one in pair])
    margin = scores[0::2] - scores[1::2]
    n_w, n_l = (np.array([int(p[k].supervised.sum()) for p in pairs]) for k in range(2))
    right, matched = correct(margin), length_matched(n_w, n_l)
    return {
        "n": len(pairs),
        "accuracy": bootstrap_ci(right, seed=seed).as_dict(),
        "n_length_matched": int(matched.sum()),
        "accuracy_length_matched": bootstrap_ci(right[matched], seed=seed).as_dict() if matched.any() else None,
        "margin": bootstrap_ci(margin, seed=seed).as_dict(),
        "longer": float(correct(n_w - n_l).mean()),
    }


def _key(pair: Pair) -> bytes:
    return b"|".join(np.asarray(side.input_ids, dtype=np.int64).tobytes() for side in pair)
