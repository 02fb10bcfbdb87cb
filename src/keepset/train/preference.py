"""Preference training through TRL's DPOTrainer, on pairs that are tokenised and masked already.

The reference is the base before training. Its log-probabilities are computed once, before the first step, so that no
second model stands in memory. keepset's own losses (`model.pair_losses.NAMES`) run over packed rows in one process;
TRL's other losses, and several processes, take TRL's step on padded rows with the same masks and reference numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from keepset.errors import DataError, RecipeError, did_you_mean
from keepset.evaluate.preference import PairLogps, pair_logps
from keepset.model import pair_losses as losses
from keepset.model.load import lora_config
from keepset.model.pack import Batch, pack, row_sums, token_nll
from keepset.train.arguments import trainer_config
from keepset.train.packed import MICRO_TOKENS, PackedSteps, Quiet, Tokens, counting, to_device, trains_packed
from keepset.train.run import finished, run_trainer
from keepset.train.training import Base, Training, TrainResult, check_rows

if TYPE_CHECKING:
    from keepset.model.encode import Encoded

    Pair = tuple[Encoded, Encoded]

# keepset's names and what TRL calls them; DavIR-DPO and SimPO are not in TRL's DPOTrainer.
TRL_NAMES = {"dpo": "sigmoid", "ipo": "ipo", "dpo_mean": "sigmoid_norm"}
TRL_ONLY = (
    "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop",
)  # fmt: skip
# Options of DPOConfig that only TRL's own step serves.
TRL_STEP = (
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "loss_weights",
    "sync_ref_model",
)


@dataclass(frozen=True)
class PairPart:
    """Some pairs that are differentiated together.

    Attributes:
        batch: both sides of p pairs, packed by length; `batch.rows` are 2·pair + (0 chosen, 1 rejected).
        reference: (p, 2) log-probabilities under the reference.
        weights: (p,) how much each pair counts in the loss.
    """

    batch: Batch
    reference: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PairCollator:
    """Makes `{"parts": [PairPart, ...], "n_items": pairs}`."""

    packed: bool
    pad_token_id: int
    micro_tokens: int = MICRO_TOKENS
    weighted: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate."""
        n_items = len(examples)
        if self.weighted:
            examples = [examples[i] for i in counting(examples)]
        pairs = [(side(e, "chosen"), side(e, "rejected")) for e in examples]
        sizes = [len(c.input_ids) + len(r.input_ids) for c, r in pairs]
        parts, start, total = [], 0, 0
        for i, size in enumerate(sizes):
            if i > start and total + size > self.micro_tokens:
                parts.append(self.part(pairs[start:i], examples[start:i]))
                start, total = i, 0
            total += size
        parts.append(self.part(pairs[start:], examples[start:]))
        return {"parts": parts, "n_items": n_items}

    def part(self, pairs: Sequence[tuple[Tokens, Tokens]], examples: Sequence[Mapping[str, Any]]) -> PairPart:
        """Pack both sides of some pairs."""
        rows = [one for pair in pairs for one in pair]
        order = np.argsort([-len(r.input_ids) for r in rows], kind="stable")
        batch = pack(rows, order, packed=self.packed, pad_token_id=self.pad_token_id)
        reference = torch.tensor([[e["ref_chosen_logps"], e["ref_rejected_logps"]] for e in examples])
        return PairPart(
            batch, reference, torch.tensor([float(e["weight"]) if self.weighted else 1.0 for e in examples])
        )


@dataclass(frozen=True)
class PaddedPairs:
    """Makes the batch TRL's own step wants: chosen rows, then rejected rows, right padded."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate."""
        rows = [side(e, name) for name in ("chosen", "rejected") for e in examples]
        batch = pack(rows, np.arange(len(rows)), packed=False, pad_token_id=self.pad_token_id)
        mask = torch.zeros_like(batch.input_ids)
        for r, row in enumerate(rows):
            mask[r, : len(row.supervised)] = torch.from_numpy(row.supervised.astype(np.int64))
        assert batch.attention_mask is not None
        out = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "completion_mask": mask}
        return out | {k: torch.tensor([e[k] for e in examples]) for k in ("ref_chosen_logps", "ref_rejected_logps")}


def side(example: Mapping[str, Any], name: str) -> Tokens:
    """One side of a pair from its two columns."""
    return Tokens(
        np.asarray(example[f"{name}_ids"], dtype=np.int64),
        np.asarray(example[f"{name}_labels"], dtype=np.int64) != -100,
    )


def side_logps(model: Any, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Summed log-probabilities and supervised tokens of packed pairs, each (chosen, rejected), (p,); differentiable."""
    n = len(batch.rows)
    sums = -row_sums(token_nll(model, batch), batch.row_of, n)
    counts = torch.bincount(batch.row_of, minlength=n).to(sums.dtype)
    back = torch.from_numpy(np.argsort(batch.rows)).to(sums.device)
    sums, counts = sums[back].view(-1, 2), counts[back].view(-1, 2)
    return (sums[:, 0], sums[:, 1]), (counts[:, 0], counts[:, 1])


@dataclass(frozen=True)
class PairLoss:
    """What is minimised over the pairs; made by `of`, which checks it.

    Attributes:
        name: one of `model.pair_losses.NAMES`, or another of TRL's DPO losses (`exo_pair`, `aot`, `sppo_hard` …).
        beta: β.
        gamma: SimPO's γ.
    """

    name: str
    beta: float
    gamma: float = 1.0

    @staticmethod
    def of(name: str, beta: float | None = None, gamma: float = 1.0) -> PairLoss:
        """A loss with its default β (`model.pair_losses.BETA`, else 0.1) where none is given.

        Raises:
            RecipeError: an unknown name, with the closest known one.
        """
        names = [*losses.NAMES, *TRL_ONLY]
        if name not in names:
            raise RecipeError(f"loss '{name}' is unknown{did_you_mean(name, names)}; there are {', '.join(names)}")
        return PairLoss(name, losses.pair_beta(name, beta), gamma)


def train_dpo(
    training: Training,
    pairs: Sequence[Pair],
    out: Path,
    loss: PairLoss,
    *,
    base: Base | None = None,
    reference: PairLogps | None = None,
) -> TrainResult:
    """Train the base on preference pairs; LoRA, or all weights with `args.full`.

    The loss of a batch is the mean over its pairs, accumulated batches included (TRL averages the means of the
    accumulated batches, which differs when they hold different numbers of pairs). Dropout is off, as in TRL. `base` is
    the model to start from, by default `training.model`; `reference` the base's log-probabilities, if they are known
    already.

    Raises:
        DataError: no pairs, a side without a supervised token, a reference log-probability of 0 (DavIR divides by it),
            or a loss that became NaN.
        RecipeError: see `trainer_config`.
    """
    from datasets import Dataset
    from trl import DPOConfig

    sides = [one for pair in pairs for one in pair]
    check_rows(sides)
    base = base or Base.of(training.model)
    more = (loss.name, loss.beta, loss.gamma, *(("moments",) if training.moments else ()))
    plan = training.plan(sides, base.weights, *more)
    done = finished(out, plan) if training.resume else None
    if done is not None:
        return done
    trl_name = TRL_NAMES.get(loss.name, loss.name if loss.name in TRL_ONLY else "sigmoid")
    config: Any = trainer_config(
        DPOConfig, training, out, beta=loss.beta, precompute_ref_log_probs=True, loss_type=[trl_name],
        remove_unused_columns=False,  # the trainer would drop `columns_of`'s
    )  # fmt: skip
    model, tokenizer = base.load()
    reference = pair_logps(model, pairs) if reference is None else reference
    if loss.name == "davir" and min(np.abs(reference.chosen).min(), np.abs(reference.rejected).min()) == 0:
        raise DataError("a side of a pair has a log-probability of 0 under the reference; DavIR-DPO divides by it")
    data = Dataset.from_dict(training.columns(columns_of(pairs, reference)))
    trainer = dpo_trainer(model, tokenizer, config, data, training, loss)
    return run_trainer(training, trainer, tokenizer, out, plan)


def columns_of(pairs: Sequence[Pair], reference: PairLogps) -> dict[str, Any]:
    """The columns that the trainers read: tokens, labels and reference log-probabilities of both sides."""
    columns: dict[str, Any] = {"ref_chosen_logps": reference.chosen, "ref_rejected_logps": reference.rejected}
    for k, name in enumerate(("chosen", "rejected")):
        columns[f"{name}_ids"] = [np.asarray(p[k].input_ids).tolist() for p in pairs]
        columns[f"{name}_labels"] = [np.where(p[k].supervised, p[k].input_ids, -100).tolist() for p in pairs]
    return columns


def dpo_trainer(model: Any, tokenizer: Any, config: Any, data: Any, training: Training, loss: PairLoss) -> Any:
    """Make the trainer: packed steps with keepset's losses in one process, else TRL's own step.

    Raises:
        RecipeError: a loss of keepset's under arguments that only TRL's step serves, or what TRL refuses.
    """
    from trl import DPOTrainer

    class Prepared(Quiet, DPOTrainer):
        """Takes the tokenised columns and reference numbers as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    class PackedDPO(PackedSteps, Prepared):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            part = inputs["part"]
            device = next(model.parameters()).device
            logps, counts = side_logps(model, to_device(part.batch, device))
            reference = part.reference.to(logps[0])
            per_pair = losses.pair_loss(
                loss.name, logps, (reference[:, 0], reference[:, 1]), counts, beta=config.beta, gamma=loss.gamma,
                label_smoothing=config.label_smoothing,
            )  # fmt: skip
            return (per_pair * part.weights.to(per_pair)).sum() / num_items_in_batch

    own = (
        loss.name in losses.NAMES
        and config.world_size == 1
        and not (config.bf16 or config.fp16 or config.activation_offloading)
        and not any(name in training.args.extra for name in TRL_STEP)
    )
    if not own and loss.name in losses.NAMES and loss.name not in TRL_NAMES:
        raise RecipeError(
            f"loss '{loss.name}' runs in one process, without mixed precision and without {', '.join(TRL_STEP)}"
        )
    training.require_own(own)
    pad, weighted = tokenizer.pad_token_id or 0, training.weights is not None
    kind: Any = PackedDPO if own else Prepared
    collator = PairCollator(trains_packed(model), pad, weighted=weighted) if own else PaddedPairs(pad)
    more: dict[str, Any] = {} if training.args.full else {"peft_config": lora_config(training.lora, model)}
    try:
        return kind(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, data_collator=collator, **more
        )
    except ValueError as error:  # TRL refuses some combinations of loss and arguments only here
        raise RecipeError(f"loss '{loss.name}': {str(error).splitlines()[0]}") from None
