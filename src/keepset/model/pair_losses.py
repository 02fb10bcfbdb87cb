"""Pair losses for preference training: DPO, IPO, length-normalised DPO, DavIR-DPO and SimPO, line by line.

Letters: ℓ_w, ℓ_l = log π_θ(y|x) of the chosen and the rejected answer, summed over their supervised tokens (nats);
ρ_w, ρ_l = the same under the frozen reference; T_w, T_l = token counts; σ = logistic function. Every function takes and
returns one number a pair, (m,); the mean over pairs is the caller's.

DavIR-DPO is after arXiv 2310.13008v2; the others are arXiv 2305.18290 (DPO), 2310.12036 (IPO),
2405.14734 (SimPO), and TRL's `sigmoid_norm`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NAMES = ("dpo", "ipo", "dpo_mean", "davir", "simpo")
BETA = {"davir": 5.0, "simpo": 2.0}
"""β where the caller names none; 0.1 (TRL's default) for every other loss. davir: experiments/dpo-losses."""


def pair_beta(loss: str, beta: float | None) -> float:
    """β, or the loss's default."""
    return BETA.get(loss, 0.1) if beta is None else beta


def dpo_logit(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """Δ = (ℓ_w − ρ_w) − (ℓ_l − ρ_l), (m,) nats: the difference of DPO's implicit rewards at β = 1."""
    return (policy_w - ref_w) - (policy_l - ref_l)


def mean_logit(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor) -> Tensor:
    """Δ̄ = (ℓ_w − ρ_w)/T_w − (ℓ_l − ρ_l)/T_l, (m,) nats a token."""
    return (policy_w - ref_w) / n_w - (policy_l - ref_l) / n_l


def davir_logit(policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """S_w − S_l with S = (ℓ − ρ)/|ρ| = 1 − L_θ/L_ref, (m,): DavIR's score of each side; sums and means give the same.

    The denominators are the frozen reference's: they carry no gradient, also if the caller's tensors would.
    """
    ref_w, ref_l = ref_w.detach(), ref_l.detach()
    return (policy_w - ref_w) / ref_w.abs() - (policy_l - ref_l) / ref_l.abs()


def sigmoid_loss(logit: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε)·log σ(β·logit) − ε·log σ(−β·logit), (m,) nats a pair; log 2 where the logit is 0."""
    scaled = beta * logit
    if not label_smoothing:
        return -F.logsigmoid(scaled)
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def dpo_loss(
    policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """DPO: −log σ(β·Δ), (m,). Gradient: −β·σ(−β·Δ)·(∇ℓ_w − ∇ℓ_l).

    `label_smoothing` ε is the share of pairs taken to be labelled the wrong way round (conservative DPO).
    """
    return sigmoid_loss(dpo_logit(policy_w, policy_l, ref_w, ref_l), beta, label_smoothing)


def davir_dpo_loss(
    policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DavIR-DPO: −log σ(β·(S_w − S_l)), (m,); see `davir_logit`.

    A 200-token answer at 1 nat a token divides DPO's log-ratio by 200, and the gradient by as much. Under Adam that
    changes little: β sets how far a pair is pushed, not how fast (experiments/dpo-losses). Neither ρ may be 0.
    """
    return sigmoid_loss(davir_logit(policy_w, policy_l, ref_w, ref_l), beta, label_smoothing)


def dpo_mean_loss(
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    n_w: Tensor,
    n_l: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Length-normalised DPO: −log σ(β·Δ̄), (m,); TRL's `sigmoid_norm`. Arguments as `dpo_loss`, n = T."""
    return sigmoid_loss(mean_logit(policy_w, policy_l, ref_w, ref_l, n_w, n_l), beta, label_smoothing)


def ipo_loss(
    policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor, *, beta: float = 0.1
) -> Tensor:
    """IPO with token means, as TRL's `ipo`: (Δ̄ − 1/(2β))², (m,). Arguments as `dpo_mean_loss`."""
    return (mean_logit(policy_w, policy_l, ref_w, ref_l, n_w, n_l) - 1 / (2 * beta)) ** 2


def simpo_loss(
    policy_w: Tensor, policy_l: Tensor, n_w: Tensor, n_l: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """SimPO: −log σ(β·(ℓ_w/T_w − ℓ_l/T_l) − γ), (m,); there is no reference."""
    return -F.logsigmoid(beta * (policy_w / n_w - policy_l / n_l) - gamma)


def pair_loss(
    name: str,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    n_tokens: tuple[Tensor, Tensor],
    *,
    beta: float,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss called `name` (one of `NAMES`), (m,); each argument is (chosen, rejected).

    Raises:
        ValueError: no such loss.
    """
    if name == "dpo":
        return dpo_loss(*policy, *reference, beta=beta, label_smoothing=label_smoothing)
    if name == "davir":
        return davir_dpo_loss(*policy, *reference, beta=beta, label_smoothing=label_smoothing)
    if name == "dpo_mean":
        return dpo_mean_loss(*policy, *reference, *n_tokens, beta=beta, label_smoothing=label_smoothing)
    if name == "ipo":
        return ipo_loss(*policy, *reference, *n_tokens, beta=beta)
    if name == "simpo":
        return simpo_loss(*policy, *n_tokens, beta=beta, gamma=gamma)
    raise ValueError(f"no pair loss '{name}'; there are {', '.join(NAMES)}")
