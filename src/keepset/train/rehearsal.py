"""A training without its gradients: the trainer itself says which rows each step sees, and how it would step.

Order, accumulation, schedule, decay and the adapter's start depend on versions and seeds in ways that are nobody's to
copy; so the trainer that `train_sft` or `train_dpo` would run is made and run, with steps that compute nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from keepset.errors import RecipeError
from keepset.evaluate.preference import PairLogps
from keepset.features.metagradient import Course
from keepset.model import pair_losses
from keepset.train.arguments import trainer_config
from keepset.train.packed import PackedSteps
from keepset.train.preference import PairLoss, columns_of, dpo_trainer
from keepset.train.sft import sft_trainer
from keepset.train.training import Training

if TYPE_CHECKING:
    from keepset.model.encode import Encoded

QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
"""Also against `train.extra`: a rehearsal is told to nobody."""


def rehearse(
    training: Training, sides: Sequence[tuple[Encoded, ...]], model: Any, tokenizer: Any
) -> tuple[Course, Any]:
    """Run a training's loop and return its steps, and the model with the fresh adapter that it starts from.

    Args:
        training: model, adapter, arguments, seed.
        sides: n rows as `keepset.train.fit.fit` takes them.
        model: the base, which gets the adapter.
        tokenizer: the base's.

    Raises:
        RecipeError: a training that keepset can't differentiate: all weights, dropout, several processes, mixed
            precision, another optimiser than AdamW, or a loss that only TRL's own step serves.
    """
    args = training.args
    if args.full:
        raise RecipeError("metagradient follows a LoRA's training: remove train.full")
    if training.lora.lora_dropout or dropout_of(model):
        raise RecipeError("metagradient follows a training without dropout: set lora.lora_dropout: 0, or take another "
                          "model: this one's own code drops out")  # fmt: skip
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        raise RecipeError("metagradient follows a training in float32: set model.dtype: float32")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(training, sides, model, tokenizer, Path(folder))
        own = isinstance(trainer, PackedSteps)
        if not own or trainer.args.neftune_noise_alpha or getattr(trainer.args, "label_smoothing", 0):
            raise RecipeError("metagradient follows keepset's own training step: remove from train.extra what changes "
                              "it (mixed precision, packing, label smoothing, noise, other losses)")  # fmt: skip
        steps = Steps()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(steps)
        trainer.data_collator = steps.collate
        trainer.training_step = steps.training_step
        trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    return steps.course(optimizer, trainer.model, float(trainer.args.max_grad_norm or 0)), trainer.model.eval()


def dropout_of(model: Any) -> bool:
    """Whether a model drops out in training: by modules, or in its attention."""
    return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()) or any(
        isinstance(v, float) and v > 0 and "att" in k and "drop" in k
        for k, v in model.config.get_text_config().to_dict().items()
    )


def make_trainer(
    training: Training, sides: Sequence[tuple[Encoded, ...]], model: Any, tokenizer: Any, out: Path
) -> Any:
    """The trainer of these rows; in the place of labels and reference numbers stands each row's position."""
    from datasets import Dataset
    from trl import DPOConfig, SFTConfig

    args, n = training.args, len(sides)
    extra = {k: v for k, v in args.extra.items() if k not in QUIET}
    training = replace(training, args=args.model_copy(update={"extra": extra}))
    if args.loss == "sft":
        config: Any = trainer_config(SFTConfig, training, out, **QUIET)
        columns: dict[str, Any] = {
            "input_ids": [np.asarray(row[0].input_ids).tolist() for row in sides],
            "labels": [[i] * len(row[0].input_ids) for i, row in enumerate(sides)],
        }
        return sft_trainer(model, tokenizer, config, Dataset.from_dict(columns), training)
    loss = PairLoss.of(args.loss, args.beta)
    if loss.name not in pair_losses.NAMES:
        raise RecipeError(f"metagradient can't follow train.loss: {loss.name}")
    config = trainer_config(
        DPOConfig, training, out, beta=loss.beta, precompute_ref_log_probs=True, remove_unused_columns=False, **QUIET
    )
    place = np.arange(n, dtype=np.float64)
    data = Dataset.from_dict(
        columns_of([(row[0], row[1]) for row in sides], PairLogps(place, place, place + 1, place + 1))
    )
    return dpo_trainer(model, tokenizer, config, data, training, loss)


def settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an optimiser's groups must share, all but the weight decay."""
    return tuple(group.get(name) for name in ("betas", "eps", "initial_lr", "lr", "amsgrad", "maximize"))


class Steps(TrainerCallback):
    """Notes the rows and the learning rate of every optimiser step."""

    def __init__(self) -> None:
        """Nothing is noted yet."""
        self.batches: list[list[int]] = []
        self.rates: list[float] = []
        self.rows: list[int] = []

    @staticmethod
    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch's rows; it is made one batch ahead of its step."""
        rows = [int(e["labels"][0] if "labels" in e else e["ref_chosen_logps"]) for e in examples]
        return {"rows": rows, "n_items": len(rows)}

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Note a batch's rows; nothing is differentiated."""
        self.rows += inputs["rows"]
        return torch.zeros((), device=next(model.parameters()).device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches since the last step are this one's; its rate stands in the optimiser."""
        self.batches.append(self.rows)
        self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))
        self.rows = []

    def course(self, optimizer: Any, model: Any, max_norm: float) -> Course:
        """What was noted.

        Raises:
            RecipeError: another optimiser than AdamW, or parameters with different settings.
        """
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        groups = [g for g in optimizer.param_groups if g["params"]]
        if type(optimizer) is not torch.optim.AdamW or len({settings(g) for g in groups}) != 1 or groups[0]["amsgrad"]:
            raise RecipeError("metagradient follows plain AdamW: remove the optimiser's settings from train.extra")
        first = groups[0]
        decay = {names[id(p)]: float(g["weight_decay"]) for g in groups for p in g["params"]}
        beta1, beta2 = (float(b) for b in first["betas"])
        batches = [np.array(rows, dtype=np.int64) for rows in self.batches]
        in_order = {name: decay[name] for name in names.values()}
        return Course(batches, np.array(self.rates), in_order, (beta1, beta2), float(first["eps"]), max_norm)
