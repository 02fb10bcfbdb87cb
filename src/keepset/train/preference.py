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
from keepset.model import pair_losses as losses
from keepset.model.pack import Batch, pack, row_sums, token_nll
from keepset.recipe import LoraSpec, ModelSpec, TrainSpec
from keepset.train.packed import MICRO_TOKENS, PackedSteps, Tokens, to_device, trains_packed
from keepset.train.sft import TrainResult, base_weights, check_rows, finished, plan_of, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from keepset.evaluate.preference import PairLogps
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
    """

    batch: Batch
    reference: Tensor


@dataclass(frozen=True)
class PairCollator:
    """Makes `{"parts": [PairPart, ...], "n_items": pairs}`."""

    packed: bool
    pad_token_id: int
    micro_tokens: int = MICRO_TOKENS

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate."""
        pairs = [(side(e, "chosen"), side(e, "rejected")) for e in examples]
        sizes = [len(c.input_ids) + len(r.input_ids) for c, r in pairs]
        parts, start, total = [], 0, 0
        for i, size in enumerate(sizes):
            if i > start and total + size > self.micro_tokens:
                parts.append(self.part(pairs[start:i], examples[start:i]))
                start, total = i, 0
            total += size
        parts.append(self.part(pairs[start:], examples[start:]))
        return {"parts": parts, "n_items": len(pairs)}

    def part(self, pairs: Sequence[tuple[Tokens, Tokens]], examples: Sequence[Mapping[str, Any]]) -> PairPart:
        """Pack both sides of some pairs."""
        rows = [one for pair in pairs for one in pair]
        order = np.argsort([-len(r.input_ids) for r in rows], kind="stable")
        batch = pack(rows, order, packed=self.packed, pad_token_id=self.pad_token_id)
        return PairPart(batch, torch.tensor([[e["ref_chosen_logps"], e["ref_rejected_logps"]] for e in examples]))


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


def train_dpo(
    spec: ModelSpec,
    lora: LoraSpec,
    pairs: Sequence[Pair],
    out: Path,
    args: TrainSpec,
    *,
    loss: str = "dpo",
    beta: float | None = None,
    gamma: float = 1.0,
    seed: int,
    reference: PairLogps | None = None,
    moments: bool = False,
    resume: bool = True,
    console: Console | None = None,
) -> TrainResult:
    """Train the base on preference pairs; LoRA, or all weights with `args.full`.

    The loss of a batch is the mean over its pairs, accumulated batches included (TRL averages the means of the
    accumulated batches, which differs when they hold different numbers of pairs). Dropout is off, as in TRL.

    Args:
        spec: the base model, which is also the reference.
        lora: the adapter; not looked at with `args.full`.
        pairs: (chosen, rejected) as encoded rows.
        out: result folder, as `train_sft`.
        args: epochs, rate, batch (in pairs); `args.extra` goes to TRL's DPOConfig (`label_smoothing`, `ld_alpha` …).
        loss: one of `model.pair_losses.NAMES`, or another of TRL's DPO losses (`exo_pair`, `aot`, `sppo_hard` …).
        beta: β; None takes 0.1, for `davir` and `simpo` the values in `keepset.model.pair_losses.BETA`.
        gamma: SimPO's γ.
        seed: of adapter initialisation and order.
        reference: the base's log-probabilities of these pairs, if they are known already.
        moments: keep every epoch's checkpoint as `out/checkpoint-<step>` with Adam's moments.
        resume: as `train_sft`.
        console: where progress is shown.

    Raises:
        DataError: no pairs, a side without a supervised token, a reference log-probability of 0 (DavIR divides by it),
            or a loss that became NaN.
        RecipeError: unknown loss; and see `trainer_config`.
    """
    from keepset.model.load import load

    check_loss(loss)
    beta = losses.pair_beta(loss, beta)
    base = base_weights(spec)
    plan = pair_plan(spec, lora, pairs, args, seed, base, loss, beta, gamma, moments)
    done = finished(out, plan) if resume else None
    if done is not None:
        return done
    loaded = load(spec)
    return fit_dpo(
        loaded.model, loaded.tokenizer, spec, lora, pairs, out, args, loss=loss, beta=beta, gamma=gamma, seed=seed,
        base=base, reference=reference, moments=moments, resume=resume, console=console,
    )  # fmt: skip


def fit_dpo(
    model: Any,
    tokenizer: Any,
    spec: ModelSpec,
    lora: LoraSpec,
    pairs: Sequence[Pair],
    out: Path,
    args: TrainSpec,
    *,
    loss: str,
    beta: float,
    gamma: float = 1.0,
    seed: int,
    base: str = "",
    reference: PairLogps | None = None,
    moments: bool = False,
    resume: bool = True,
    console: Console | None = None,
) -> TrainResult:
    """`train_dpo` of a model that is in memory; the model is changed. Arguments as there, `base` as of `fit_sft`."""
    from datasets import Dataset
    from trl import DPOConfig

    from keepset.evaluate.preference import pair_logps

    check_loss(loss)
    check_rows([one for pair in pairs for one in pair])
    plan = pair_plan(spec, lora, pairs, args, seed, base, loss, beta, gamma, moments)
    done = finished(out, plan) if resume else None
    if done is not None:
        return done
    more: dict[str, Any] = {"beta": beta, "precompute_ref_log_probs": True}
    if moments:
        more["save_total_limit"] = None
    more["loss_type"] = [TRL_NAMES.get(loss, loss if loss in TRL_ONLY else "sigmoid")]
    config: Any = trainer_arguments(DPOConfig, args, out, seed, spec, more)
    reference = pair_logps(model, pairs) if reference is None else reference
    if loss == "davir" and min(np.abs(reference.chosen).min(), np.abs(reference.rejected).min()) == 0:
        raise DataError("a side of a pair has a log-probability of 0 under the reference; DavIR-DPO divides by it")
    columns: dict[str, Any] = {"ref_chosen_logps": reference.chosen, "ref_rejected_logps": reference.rejected}
    for k, name in enumerate(("chosen", "rejected")):
        columns[f"{name}_ids"] = [np.asarray(p[k].input_ids).tolist() for p in pairs]
        columns[f"{name}_labels"] = [np.where(p[k].supervised, p[k].input_ids, -100).tolist() for p in pairs]
    data = Dataset.from_dict(columns)
    trainer = dpo_trainer(model, tokenizer, config, data, lora if not args.full else None, args, loss, gamma)
    return run_trainer(
        trainer, out, plan, tokenizer=tokenizer, full=args.full, resume=resume, moments=moments, console=console
    )  # fmt: skip


def dpo_trainer(
    model: Any, tokenizer: Any, config: Any, data: Any, lora: LoraSpec | None, args: TrainSpec, loss: str, gamma: float
) -> Any:
    """Make the trainer: packed steps with keepset's losses in one process, else TRL's own step."""
    from trl import DPOTrainer

    from keepset.model.load import lora_config

    class Prepared(DPOTrainer):
        """Takes the tokenised columns and reference numbers as they are."""

        _tag_names = ["trl", "dpo"]
        _name = "DPO"

        def _send_telemetry(self) -> None:
            return

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = data.column_names

    class PackedDPO(PackedSteps, Prepared):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            part = inputs["part"]
            device = next(model.parameters()).device
            logps, counts = side_logps(model, to_device(part.batch, device))
            reference = part.reference.to(logps[0])
            per_pair = losses.pair_loss(
                loss, logps, (reference[:, 0], reference[:, 1]), counts, beta=config.beta, gamma=gamma,
                label_smoothing=config.label_smoothing,
            )  # fmt: skip
            return per_pair.sum() / num_items_in_batch

    own = (
        loss in losses.NAMES
        and config.world_size == 1
        and not (config.bf16 or config.fp16 or config.activation_offloading)
        and not any(name in args.extra for name in TRL_STEP)
    )
    if not own and loss in losses.NAMES and loss not in TRL_NAMES:
        raise RecipeError(
            f"loss '{loss}' runs in one process, without mixed precision and without {', '.join(TRL_STEP)}"
        )
    pad = tokenizer.pad_token_id or 0
    kind: Any = PackedDPO if own else Prepared
    collator = PairCollator(trains_packed(model), pad) if own else PaddedPairs(pad)
    more: dict[str, Any] = {"peft_config": lora_config(lora, model)} if lora is not None else {}
    try:
        return kind(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, data_collator=collator, **more
        )
    except ValueError as error:  # TRL refuses some combinations of loss and arguments only here
        raise RecipeError(f"loss '{loss}': {str(error).splitlines()[0]}") from None


def check_loss(loss: str) -> None:
    """Refuse an unknown loss.

    Raises:
        RecipeError: with the closest known name.
    """
    known = [*losses.NAMES, *TRL_ONLY]
    if loss not in known:
        raise RecipeError(f"loss '{loss}' is unknown{did_you_mean(loss, known)}; there are {', '.join(known)}")


def pair_plan(
    spec: ModelSpec,
    lora: LoraSpec,
    pairs: Sequence[Pair],
    args: TrainSpec,
    seed: int,
    base: str,
    loss: str,
    beta: float,
    gamma: float,
    moments: bool,
) -> str:
    """`plan_of` for pairs."""
    more = (loss, beta, gamma, *(("moments",) if moments else ()))
    return plan_of(spec, lora, [one for pair in pairs for one in pair], args, seed, base, *more)
