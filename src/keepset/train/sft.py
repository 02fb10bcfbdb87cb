"""Supervised fine-tuning through TRL's SFTTrainer, on rows that are tokenised and masked already.

Loss (TRL's default): Σ nll over the supervised tokens of a batch, accumulated batches included, ÷ their number. Long
answers therefore weigh more than short ones inside a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepset.model.load import lora_config
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
    more = {} if training.weights is None else {"remove_unused_columns": False}
    config: Any = trainer_config(SFTConfig, training, out, **more)
    columns = {
        "input_ids": [np.asarray(r.input_ids).tolist() for r in rows],
        "labels": [np.where(r.supervised, r.input_ids, -100).tolist() for r in rows],
    }
    model, tokenizer = base.load()
    trainer = sft_trainer(model, tokenizer, config, Dataset.from_dict(training.columns(columns)), training)
    return run_trainer(training, trainer, tokenizer, out, plan)


def sft_trainer(model: Any, tokenizer: Any, config: Any, data: Any, training: Training) -> Any:
    """Make the trainer: packed steps in one process, else TRL's own.

    Raises:
        RecipeError: weights, and arguments that TRL's own step serves.
    """
    from trl import SFTTrainer

    class PackedSFT(PackedSteps, SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return part_loss(model, inputs["part"], num_items_in_batch)

    class QuietSFT(Quiet, SFTTrainer):
        pass

    more: dict[str, Any] = {} if training.args.full else {"peft_config": lora_config(training.lora, model)}
    own = (
        config.world_size == 1
        and not (config.bf16 or config.fp16 or config.packing or config.padding_free or config.activation_offloading)
        and config.loss_type == "nll"
        and not config.label_smoothing_factor
    )
    training.require_own(own)
    if own:
        collator = collator_for(model, tokenizer.pad_token_id or 0)
        more["data_collator"] = replace(collator, weighted=training.weights is not None)
    kind = PackedSFT if own else QuietSFT
    return kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)
