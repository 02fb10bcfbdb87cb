"""Summed losses of every row under the base and its LoRA, in one sweep: what DavIR, RHO, IFD and perplexity start from.

L_i = sum over supervised t of l(z_t, y_t), in nats, token values in float32 and sums in float64. The token loss l is
one of

    ce              nll = logsumexp(z) - z_y
    label-smoothed  (1 - e) * nll + e * (logsumexp(z) - mean(z))    e = 0.1  (Szegedy et al. 2016; as torch has it)
    focal           (1 - p_y)^g * nll,  p_y = exp(-nll)             g = 2    (Lin et al. 2017, eq. 4)
    error-norm      ||softmax(z) - onehot(y)||_2: no loss, but what EL2N sums  (Paul et al. 2021, arXiv:2107.07075)

How it is made cheap: rows are packed without padding and end before their last supervised token, which predicts
nothing; a beginning that many rows share (a system line, a template's first words) is computed once; the output head
runs at supervised positions only, over blocks of the vocabulary; for the adapter pass W + s·B·A is formed once a call,
so that it costs what the base pass costs; Llama-like blocks run in `llama_forward`. Two separate full models are two
calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from keepset.memory import in_halves
from keepset.model import head
from keepset.model import llama_backward as llama_pass
from keepset.model import pack as packing
from keepset.model.linears import Linear
from keepset.model.llama_forward import LlamaForward

log = logging.getLogger(__name__)

TokenLoss = Literal["ce", "label-smoothed", "focal", "error-norm"]
SMOOTHING, GAMMA = 0.1, 2.0
SHORTEST_PREFIX, FEWEST_ROWS = 8, 4
"""A shared beginning pays from about this many tokens and rows."""


@dataclass(frozen=True)
class RowLosses:
    """Losses in the order of the given rows.

    Attributes:
        nll: (passes, n) float64, summed nats per row; one pass for each of `adapters`.
        n_tokens: (n,) int64 supervised tokens.
        token_nll: per pass a list of n arrays (n_tokens[i],) float32, if asked for.
    """

    nll: np.ndarray
    n_tokens: np.ndarray
    token_nll: list[list[np.ndarray]] | None = None


def row_losses(
    model: Any,
    rows: Sequence[packing.Row],
    *,
    token_budget: int,
    adapters: tuple[bool, ...] = (True,),
    token_loss: TokenLoss = "ce",
    per_token: bool = False,
    share_prefix: bool = True,
    merge: bool = True,
    written: bool = True,
) -> RowLosses:
    """Score rows under one model, with its adapter on and / or off.

    Args:
        model: causal LM, or PeftModel around one.
        rows: encoded rows.
        token_budget: tokens a batch holds.
        adapters: the passes over each batch: True as the model stands, False with its adapter off (a model without an
            adapter gives the same twice).
        token_loss: see the module docstring.
        per_token: also return every token's loss.
        share_prefix: compute a beginning that rows have in common once (CPU, packed).
        merge: use merged LoRA weights in the adapter pass where that is exact.
        written: run Llama-like blocks in `llama_forward` where it serves the model; False: always the model's own.

    Returns:
        Losses in the order of `rows`. A row whose loss is not finite keeps its NaN or Inf: the caller quarantines it.
    """
    packed = packing.supports_packing(model)
    device = next(model.parameters()).device
    peft = hasattr(model, "disable_adapter")
    share = share_prefix and packed and device.type == "cpu"
    n_tokens = np.asarray([int(np.count_nonzero(row.supervised)) for row in rows], dtype=np.int64)
    # Results stay on the device until the end: reading them back after every batch would make a GPU wait.
    done: list[tuple[int, np.ndarray, Tensor, Tensor | None]] = []
    span, apart = packing.full_span(model), packing.engine(model).apart
    with torch.no_grad():  # not inference_mode: the merged tensors take the place of parameters for a while
        # Also for the base alone: a pass has the same bits whichever others run beside it (a resumed shard needs that).
        weights = merged_weights(model) if merge and peft else None
        own: list[LlamaForward] | None = None
        if written and packed and (span is None or all(len(row.input_ids) <= span for row in rows)):
            own = written_passes(model, adapters, weights)
    with torch.inference_mode():
        for index, prefix in plan(rows, token_budget, share=share, span=span, apart=apart):

            def score(index: np.ndarray, prefix: int = prefix) -> None:
                shared = prefix if len(index) > 1 else 0
                batch = packing.pack(rows, index, packed=packed, device=device, prefix=shared, trim=True, apart=apart)
                for k, on in enumerate(adapters):
                    if own is not None:  # its head is a plain linear layer, the same with the adapter on and off
                        values = token_values(model, own[k](batch), batch.labels, token_loss)
                    else:
                        with _pass(model, on, peft, weights):
                            hidden = packing.last_hidden(model, batch)[batch.predict]
                            values = token_values(model, hidden, batch.labels, token_loss)
                    sums = packing.row_sums(values, batch.row_of, len(index))
                    done.append((k, index, sums, values if per_token else None))

            in_halves(index, score)
    nll = np.zeros((len(adapters), len(rows)))
    tokens: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] * len(rows) for _ in adapters]
    for k, index, sums, kept in done:
        nll[k, index] = sums.cpu().numpy()
        if kept is not None:
            parts = np.split(kept.float().cpu().numpy(), np.cumsum(n_tokens[index])[:-1])
            for i, part in zip(index, parts, strict=True):
                tokens[k][int(i)] = part
    return RowLosses(nll, n_tokens, tokens if per_token else None)


def token_values(model: Any, hidden: Tensor, labels: Tensor, token_loss: TokenLoss) -> Tensor:
    """Return the loss of each label, (S,) float32, from the final hidden states (S, d) that predict it; no gradient."""
    if token_loss == "ce":
        return packing.nll_at(model, hidden, labels)
    if token_loss == "focal":
        nll = packing.nll_at(model, hidden, labels)
        return (1 - torch.exp(-nll)) ** GAMMA * nll
    if token_loss not in ("label-smoothed", "error-norm"):
        raise ValueError(f"token_loss '{token_loss}' is not one of {', '.join(get_args(TokenLoss))}")
    inner, smoothed = packing.bare(model), token_loss == "label-smoothed"
    z, mapping = inner.get_output_embeddings(), head.logit_map(inner.config)
    if packing.engine(model).head == "linear" and type(z) is nn.Linear:
        stats = head.head_stats(
            hidden, labels, z.weight, z.bias, mapping, with_mean=smoothed, with_squares=not smoothed
        )
    else:
        size = head.CHUNK // packing.vocabulary(model)
        stats = head.stats_of_logits(lambda h: packing.own_logits(model, h), hidden, labels, size)
    if not smoothed:
        return stats.error_norm
    return (1 - SMOOTHING) * (stats.lse - stats.label) + SMOOTHING * (stats.lse - stats.mean)


# -- which rows share a beginning -----------------------------------------------------------------------------------


def plan(
    rows: Sequence[packing.Row],
    token_budget: int,
    *,
    share: bool,
    span: int | None = None,
    apart: int | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (indices, length of the shared beginning) of each batch; a pure function of the rows.

    Rows are put into groups with a common unsupervised beginning, each group is batched by length. Rows longer than
    `span` (`packing.full_span`) go without sharing, rows longer than `apart` without company.
    """
    everyone = np.arange(len(rows))
    lengths = np.asarray([packing.needed(row, apart) for row in rows], dtype=np.int64)
    groups: list[tuple[np.ndarray, int]] = [(everyone, 0)]
    if share and len(rows):
        short = everyone if span is None else np.flatnonzero([len(row.input_ids) <= span for row in rows])
        groups = prefix_groups(rows, short)
        rest = np.setdiff1d(everyone, short)
        if len(rest):
            groups.append((rest, 0))
    for members, prefix in groups:
        for batch in packing.plan_batches(lengths[members] - prefix, max(1, token_budget - prefix), apart):
            yield members[batch], prefix if len(batch) > 1 else 0


def prefix_groups(rows: Sequence[packing.Row], members: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Group rows by common beginnings: a group splits off where `SHORTEST_PREFIX` more tokens are shared by enough
    rows.

    Returns:
        (indices, prefix length) of each group; the first token that is supervised is never part of the beginning,
        and every row has a token of its own.
    """
    free = {int(i): min(int(np.argmax(rows[i].supervised)), packing.needed(rows[i]) - 1) for i in members}

    def split(group: list[int]) -> list[tuple[np.ndarray, int]]:
        common = np.asarray(rows[group[0]].input_ids[: min(free[i] for i in group)])
        for i in group:
            same = common == np.asarray(rows[i].input_ids[: len(common)])
            if not same.all():
                common = common[: int(np.argmin(same))]
        depth = len(common)
        after: dict[int, list[int]] = {}
        for i in group:
            if free[i] >= depth + SHORTEST_PREFIX:
                after.setdefault(int(rows[i].input_ids[depth]), []).append(i)
        out: list[tuple[np.ndarray, int]] = []
        rest = set(group)
        for some in after.values():
            if 4 * FEWEST_ROWS <= len(some) < len(group):
                for indices, length in split(some):
                    if length >= depth + SHORTEST_PREFIX:
                        out.append((indices, length))
                        rest -= {int(i) for i in indices}
        if rest:
            pays = depth >= SHORTEST_PREFIX and len(rest) >= FEWEST_ROWS
            out.append((np.asarray(sorted(rest)), depth if pays else 0))
        return out

    return split([int(i) for i in members]) if len(members) else []


# -- merged adapter weights, and the passes that use them -----------------------------------------------------------


def written_passes(
    model: Any, adapters: tuple[bool, ...], weights: list[tuple[Any, Tensor, Tensor]] | None
) -> list[LlamaForward] | None:
    """One `LlamaForward` for each pass, or None where the model's own forward must run."""
    if hasattr(model, "disable_adapter") and weights is None:
        return None
    found: dict[bool, LlamaForward] = {}
    for on in set(adapters):
        linears = {
            str(place): Linear(module, both if on else base, module.get_base_layer().bias, (), recorded=False)
            for place, (module, base, both) in enumerate(weights or [])
        }
        if not llama_pass.serves(model, linears):
            return None
        found[on] = LlamaForward(model, linears)
    return [found[on] for on in adapters]


def merged_weights(model: Any) -> list[tuple[Any, Tensor, Tensor]] | None:
    """Form W + s·B·A of every LoRA layer; None unless all of the adapter is one plain LoRA on float32 linear layers."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    out: list[tuple[Any, Tensor, Tensor]] = []
    embedding = packing.bare(model).get_input_embeddings().weight
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for module in layers:
        plain = (
            type(module) is LoraLinear
            and isinstance(module, LoraLayer)
            and type(module.get_base_layer()) is nn.Linear
            and len(module.active_adapters) == 1
            and module.active_adapters[0] in module.lora_A
            and not module.merged
            and not module.lora_variant
            and not module.disable_adapters
            and not module.lora_bias.get(module.active_adapters[0], False)
        )
        if not plain:
            return None
        base = module.get_base_layer().weight
        if base.dtype != torch.float32 or base is embedding:  # a tied head's weight must not take the embedding along
            return None
        name = module.active_adapters[0]
        up, down = module.lora_B[name].weight, module.lora_A[name].weight
        out.append((module, base.data, torch.addmm(base.data, up, down, alpha=float(module.scaling[name]))))
    modules_to_save = any("modules_to_save" in n for n, _ in model.named_modules())
    return out if out and not modules_to_save else None


@contextmanager
def _pass(model: Any, on: bool, peft: bool, weights: list[tuple[Any, Tensor, Tensor]] | None) -> Iterator[None]:
    """Run with the adapter on or off; with merged weights the adapter is off and W or W + s·B·A is in place."""
    if not peft or (on and weights is None):
        yield
        return
    with model.disable_adapter():
        if on and weights is not None:
            for module, _, both in weights:
                module.get_base_layer().weight.data = both
        try:
            yield
        finally:
            if on and weights is not None:
                for module, base, _ in weights:
                    module.get_base_layer().weight.data = base
