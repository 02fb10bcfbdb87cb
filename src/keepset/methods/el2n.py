"""EL2N and GraNd: data diet (arXiv 2107.07075), for sequences.

    S_EL2N(z)  = (1/T) Σ_t ‖softmax(f_t) − onehot(y_t)‖₂
    S_GraNd(z) = mean_c ‖∇ℓ(z; θ_c)‖₂,   ℓ(z) = −(1/T) Σ_t log softmax(f_t)[y_t]

f_t: logits at the t-th of T supervised tokens, y_t: the token; θ_c: checkpoints early in training. Larger = harder =
first, as in the paper. The paper averages over several initialisations of a classifier; with one pre-trained model
there is one, and the mean over tokens is our extension, the same T tokens with the same weight 1/T in both: EL2N
averages the lengths of the tokens' errors, GraNd takes the length of their averaged gradient, on the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keepset.methods.gradient import GradientMethod, of_store
from keepset.methods.method import Columns, Features, Method, Scores, score_noise
from keepset.stages.losses import Losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def el2n(error_norms: np.ndarray, n_tokens: np.ndarray | None = None) -> np.ndarray:
    """Score rows by the mean length of their error vectors.

    `error_norms`, (n,) or (c, n), are Σ_t ‖p_t − onehot(y_t)‖₂ over a row's `n_tokens` (n,) supervised tokens, a
    checkpoint; without `n_tokens` they are means already. Returns (n,) float64 in [0, √2], the mean over checkpoints.
    """
    norms = np.atleast_2d(np.asarray(error_norms, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (norms if n_tokens is None else norms / np.asarray(n_tokens)).mean(axis=0)


def grand(norms: np.ndarray) -> np.ndarray:
    """Score rows by their gradient norm (c, n) or (n,), mean over checkpoints: (n,) float64."""
    return np.atleast_2d(np.asarray(norms, dtype=np.float64)).mean(axis=0)


@dataclass(frozen=True)
class El2n(Method):
    """Mean over the row's supervised tokens of ‖softmax − onehot‖, under the base."""

    name = "el2n"
    when = "as a baseline; it told nothing of the trained models in our bank"
    paper = "EL2N, arXiv 2107.07075"
    formula = "S = (1/T) Σ_t ‖p_t − onehot(y_t)‖"
    needs = ("error-norms",)
    cost = "forward"

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"errors": Losses(token_loss="error-norm")}

    def score(self, features: Features) -> Scores:
        errors = features["errors"]
        return Scores(el2n(errors["nll"], errors["n_tokens"]))

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """A mean of distances of distributions; a probability near 1 has the noise of 1, not of its distance."""
        return relative * np.maximum(np.abs(columns["score"]), 1.0)


@dataclass(frozen=True)
class GradNorm(GradientMethod):
    """Norm of the plain gradient of the row's mean token loss, mean over the warm-up's checkpoints."""

    name = "grad-norm"
    when = "as a baseline; it told nothing of the trained models in our bank"
    paper = "GraNd, arXiv 2107.07075"
    formula = "S = mean_c ‖∇ℓ(z)‖"

    def reduce_dots(
        self, features: Features, dots: np.ndarray, norms: np.ndarray, lr: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return grand(norms), np.zeros((norms.shape[1], 0))

    def noise(self, columns: Columns, relative: float) -> np.ndarray | None:
        return None if of_store(columns) else score_noise(columns, relative)
