"""Training steps over packed rows: no padding, the output head at supervised positions only, bounded memory.

TRL's own step pads every row of a batch to the longest and, without Triton, runs the head at every position. Here a
batch is divided into parts of at most `MICRO_TOKENS` tokens, each packed (`model.pack`) and differentiated on its
own. The loss is TRL's: Σ nll over all supervised tokens of the (accumulated) batch ÷ their number, so the parts'
gradients add up to the same gradient, to rounding. It serves one process in the weights' own precision; everything else
(several processes, mixed precision, other losses) takes TRL's path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from keepset.model.pack import Batch, pack, plan_batches, supports_packing, token_nll

MICRO_TOKENS = 2048


@dataclass(frozen=True)
class Tokens:
    """A row as packing wants it."""

    input_ids: np.ndarray
    supervised: np.ndarray

    @staticmethod
    def of(example: Mapping[str, Any]) -> Tokens:
        """Make one from TRL's columns `input_ids` and `labels` (-100 where the loss doesn't look)."""
        return Tokens(
            np.asarray(example["input_ids"], dtype=np.int64), np.asarray(example["labels"], dtype=np.int64) != -100
        )


@dataclass(frozen=True)
class PackedCollator:
    """Makes `{"parts": [Batch, ...], "n_items": supervised tokens}` of TRL's examples.

    With `weighted` the examples have a column `weight`. Rows of weight 0 are not run; they count in `n_items`.
    """

    packed: bool
    pad_token_id: int
    micro_tokens: int = MICRO_TOKENS
    weighted: bool = False

    def parts(self, rows: Sequence[Tokens]) -> list[Batch]:
        """Divide the rows, longest first, so that rows of one length stand side by side."""
        plan = plan_batches([len(r.input_ids) for r in rows], self.micro_tokens)
        return [pack(rows, part, packed=self.packed, pad_token_id=self.pad_token_id) for part in plan]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate."""
        rows = [Tokens.of(e) for e in examples]
        parts: list[Any]
        if self.weighted:
            counted = counting(examples)
            weights = torch.tensor([float(examples[i]["weight"]) for i in counted])
            parts = [Weighted(b, weights[b.rows]) for b in self.parts([rows[i] for i in counted])]
        else:
            parts = self.parts(rows)
        return {"parts": parts, "n_items": sum(int(r.supervised.sum()) for r in rows)}


@dataclass(frozen=True)
class Weighted:
    """A batch, and how much each of its rows counts in the loss (n,)."""

    batch: Batch
    weights: torch.Tensor


def counting(examples: Sequence[Mapping[str, Any]]) -> list[int]:
    """The examples that are run: all but those of weight 0.

    Where all have weight 0, the first one, whose gradient is then 0: the optimiser takes its step as in every batch.
    """
    return [i for i, e in enumerate(examples) if float(e["weight"]) != 0.0] or [0]


def trains_packed(model: Any) -> bool:
    """Say whether the model's attention serves packed rows in training, which is without attention dropout."""
    config = model.config.get_text_config().to_dict()
    # attention_dropout, attn_pdrop, attention_probs_dropout_prob ...
    dropout = [v for k, v in config.items() if "att" in k and "drop" in k and isinstance(v, int | float)]
    return supports_packing(model) and not any(dropout)


def collator_for(model: Any, pad_token_id: int) -> PackedCollator:
    """Packed where the model's attention allows it, else padded; the head is at supervised positions either way."""
    return PackedCollator(trains_packed(model), pad_token_id)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors."""
    moved: dict[str, Any] = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, **moved)


class Quiet:
    """Mixin for TRL's trainers: nothing is sent anywhere."""

    def _send_telemetry(self) -> None:
        return


class PackedSteps(Quiet):
    """Mixin for TRL's trainers: `compute_loss` sees one part at a time."""

    loss_is_scaled_for_ga: Any = True  # `Any`: TRL and transformers declare it differently
    counted: Any = None  # a Recorder that is told the tokens

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        """Return the accumulated batches and how many items (tokens or pairs) their loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        return batches, sum(b["n_items"] for b in batches)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Differentiate part after part; the parts' losses add up to the batch's."""
        losses = []
        for part in inputs["parts"]:
            losses.append(super().training_step(model, {"part": part}, num_items_in_batch))  # type: ignore[misc]
            batch = getattr(part, "batch", part)
            if self.counted is not None:
                self.counted.tokens += sum(batch.lengths)
                self.counted.supervised += len(batch.labels)
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here; `keepset.model.flops` does."""
        return 0


def part_loss(model: Any, part: Batch | Weighted, n_items: int) -> torch.Tensor:
    """Σ weight · nll of a part ÷ supervised tokens of the whole batch, in nats a token."""
    device = next(model.parameters()).device
    if isinstance(part, Batch):
        return token_nll(model, to_device(part, device)).sum() / n_items
    batch = to_device(part.batch, device)
    nll = token_nll(model, batch)
    return (nll * part.weights.to(nll)[batch.row_of]).sum() / n_items
