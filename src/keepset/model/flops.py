"""What a stage costs in floating-point operations, from counts alone, so that methods can be compared on any machine.

forward = 2 · (W · T + d · V · S): W = weights of the blocks' matrices, T = tokens, d = hidden size, V = vocabulary,
S = positions at which the output head runs. A backward pass through frozen weights costs one more forward (gradients of
the activations only), with trained weights two more. Experts count by the share of them that a token sees. Attention
scores, norms and LoRA's own matrices are left out: they are a few per cent at the lengths of instruction data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keepset.lazy import Lazy, column, flat

if TYPE_CHECKING:
    from keepset.model.encode import Encoded
    from keepset.recipe import TrainSpec


EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configurations call the number of experts that a token sees."""


def matrix_weights(model: Any) -> tuple[float, int]:
    """`(W, d·V)`: weights of the blocks' matrices that a token meets, adapters left out, and of the output head."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    seen = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    active = next((n for k in EXPERTS_A_TOKEN if (n := getattr(config, k, None))), 1)
    blocks = 0.0
    for name, p in model.named_parameters():
        if p.ndim < 2 or id(p) in seen or "lora_" in name:
            continue
        # transformers keeps all experts of a layer in one (experts, out, in) tensor
        share = min(1.0, active / p.shape[0]) if p.ndim == 3 and "expert" in name else 1.0
        blocks += p.numel() * share
    return blocks, head


def flops(model: Any, n_tokens: int, n_head: int, *, passes: float = 1) -> float:
    """Operations of `passes` forward-equivalents over `n_tokens` tokens, the head at `n_head` positions.

    `passes` is 1 for a forward pass, 2 for forward + backward through frozen weights (LoRA), 3 for full training; a
    backward pass that stops early counts by its share of the layers.
    """
    blocks, head = matrix_weights(model)
    return 2.0 * passes * (blocks * n_tokens + head * n_head)


def count_tokens(rows: Sequence[Encoded]) -> tuple[int, int]:
    """Tokens and supervised tokens of some rows."""
    counts = rows.counts() if isinstance(rows, Lazy) else None
    if counts is not None:
        return int(counts[0].sum()), int(counts[1].sum())
    tokens = supervised = 0
    for row in rows:
        tokens += len(row.input_ids)
        supervised += int(row.supervised.sum())
    return tokens, supervised


def trained_sides(sides: Sequence[tuple[Encoded, ...]], args: TrainSpec) -> Sequence[Encoded]:
    """The rows that a training runs over: both sides of each pair, or under `loss: sft` the first alone."""
    return column(sides, 0) if args.loss == "sft" else flat(sides)
