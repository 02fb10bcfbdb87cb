"""Supervised fine-tuning through TRL's SFTTrainer, on rows that are tokenised and masked already.

Loss (TRL's default): Σ nll over the supervised tokens of a batch, accumulated batches included, ÷ their number. Long
answers therefore weigh more than short ones inside a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.model.load import lora_config
from keepset.recipe import LoraSpec
from keepset.train.arguments import trainer_config
from keepset.train.packed import PackedSteps, Quiet, collator_for, part_loss
from keepset.train.run import finished, run_trainer
from keepset.train.training import Base, Training, TrainResult, check_rows

if TYPE_CHECKING:
    from keepset.model.encode import Encoded


def train_sft(training: Training, rows: Sequence[Encoded], out: Path, base: Base | None = None) -> TrainResult:
    """Fine-tune the base on `rows`; LoRA, or all weights with `args.full`.

    The loss is TRL's default (module docstring). The same rows, arguments and seed give the same weights on one
    machine. An interrupted training goes on from its last checkpoint (one an epoch) exactly; a finished one is returned
    as it is. `base` is the model to start from, by default `training.model`.

    Raises:
        DataError: no rows, a row without a supervised token, or a loss that became NaN.
        RecipeError: see `trainer_config`.
        ModelError: see `lora_config`.
    """
    from datasets import Dataset
    from trl import SFTConfig

    check_rows(rows)
    base = base or Base.of(training.model)
    plan = training.plan(rows, base.weights, training.moments)
    done = finished(out, plan) if training.resume else None
    if done is not None:
        return done
    config: Any = trainer_config(SFTConfig, training, out)
    columns = {
        "input_ids": [np.asarray(r.input_ids).tolist() for r in rows],
        "labels": [np.where(r.supervised, r.input_ids, -100).tolist() for r in rows],
    }
    model, tokenizer = base.load()
    lora = None if training.args.full else training.lora
    trainer = sft_trainer(model, tokenizer, config, Dataset.from_dict(columns), lora)
    return run_trainer(training, trainer, tokenizer, out, plan)


def sft_trainer(model: Any, tokenizer: Any, config: Any, data: Any, lora: LoraSpec | None) -> Any:
    """Make the trainer: packed steps in one process, else TRL's own."""
    from trl import SFTTrainer

    class PackedSFT(PackedSteps, SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return part_loss(model, inputs["part"], num_items_in_batch)

    class QuietSFT(Quiet, SFTTrainer):
        pass

    more: dict[str, Any] = {"peft_config": lora_config(lora, model)} if lora is not None else {}
    own = (
        config.world_size == 1
        and not (config.bf16 or config.fp16 or config.packing or config.padding_free or config.activation_offloading)
        and config.loss_type == "nll"
        and not config.label_smoothing_factor
    )
    if own:
        more["data_collator"] = collator_for(model, tokenizer.pad_token_id or 0)
    kind = PackedSFT if own else QuietSFT
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)
