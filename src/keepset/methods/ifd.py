"""IFD: instruction-following difficulty, "Cherry" (arXiv 2308.12032; Superfiltering, 2402.00530, by a small model).

    S(z) = IFD = L(y | x) / L(y)   if IFD ≤ 1,   else −IFD

L(y | x): mean nats a token of the answer given the prompt. L(y): the same answer without any prompt. High but below
1: the prompt helps, yet little. Above 1 the prompt hurts, a sign of a mismatched pair: the authors filter these out;
here they rank below every other row, so that no row vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keepset.methods.method import Columns, Features, Method, Scores, score_noise
from keepset.stages.losses import Losses
from keepset.stages.stage import Stage

if TYPE_CHECKING:
    from keepset.stages.job import Job


def ifd(
    nll_given_prompt: np.ndarray,
    nll_alone: np.ndarray,
    n_tokens: np.ndarray | None = None,
    n_tokens_alone: np.ndarray | None = None,
    *,
    ceiling: float = 1.0,
) -> np.ndarray:
    """Score rows by how little their prompt helps their answer.

    Losses (n,) are nats of the answer, summed over `n_tokens` (n,); without those they are means already.
    `n_tokens_alone` is for where they differ: without a prompt the first token may go unpredicted. Returns (n,)
    float64; NaN for a row without tokens.
    """
    given, alone = np.asarray(nll_given_prompt, dtype=np.float64), np.asarray(nll_alone, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if n_tokens is not None:
            given = given / n_tokens
            alone = alone / (n_tokens if n_tokens_alone is None else n_tokens_alone)
        ratio = given / alone
        return np.where(ratio > ceiling, -ratio, ratio)


@dataclass(frozen=True)
class Ifd(Method):
    """How little the prompt helps the answer."""

    name = "ifd"
    when = "to filter rows whose prompt does not help the answer; it told nothing of the trained models in our bank"
    paper = "Cherry, arXiv 2308.12032"
    formula = "S = L(y | x) / L(y), above 1 last"
    needs = ("losses", "answers")
    cost = "forward"
    ceiling: float = 1.0

    def stages(self, job: Job, shots: int | None) -> dict[str, Stage]:
        return {"given": Losses(), "alone": Losses(of="alone")}

    def score(self, features: Features) -> Scores:
        given, alone = features["given"], features["alone"]
        score = ifd(given["nll"], alone["nll"], given["n_tokens"], alone["n_tokens"], ceiling=self.ceiling)
        return Scores(score, {"loss_ini": given["nll"], "loss_alone": alone["nll"]})

    def noise(self, columns: Columns, relative: float) -> np.ndarray:
        """That of a quotient of two losses."""
        return 2 * score_noise(columns, relative)
