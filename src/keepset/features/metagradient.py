"""The exact derivative of a loss after a whole training run with respect to each example's weight in it.

A training takes T steps. Step t sees the examples B_t; example e has the loss ℓ_e and the mass M_e (SFT: its summed
token losses and its number of supervised tokens; pairs: the pair's loss and 1), and w_e is its weight, 1 in the run:

    L_t(θ) = Σ_{e in B_t} w_e ℓ_e(θ) / D_t,   D_t = Σ_{e in B_t} M_e              accumulated batches together
    g = ∇L_t(θ_{t−1}),   ĝ = c·g,   c = min(1, G / (‖g‖ + 1e-6))                  clipping by global norm
    m_t = b1 m_{t−1} + (1−b1) ĝ,   v_t = b2 v_{t−1} + (1−b2) ĝ²
    θ_t = (1 − η_t ω) θ_{t−1} − (η_t / c1) · m_t / r,   r = √(v_t / c2) + ε,   c1 = 1 − b1^t,  c2 = 1 − b2^t

These weights are the trainer's (`Training.weights`): D_t is the same whatever they are, and w_e = 0 is the run without
e, with the same start, order and denominators. The derivative of J(θ_T) is had backwards. With a, p, q = ∂J/∂θ_t,
∂J/∂m_t, ∂J/∂v_t (a = ∇J, p = q = 0 at the end), one step gives

    p ← p − (η_t / c1) · a / r
    q ← q + (η_t / c1) · a m_t / (2 r² √(v_t c2))          0 where v_t = 0: every ĝ so far was 0
    s = (1−b1) p + 2 (1−b2) ĝ q                            ∂J/∂ĝ
    u = s;  where c < 1:  u = c s − g · c ⟨g, s⟩ / (‖g‖ (‖g‖ + 1e-6))             ∂J/∂g
    ∂J/∂w_e += ⟨∇ℓ_e, u⟩ / D_t
    a ← (1 − η_t ω) a + ∇²L_t(θ_{t−1}) u,   p ← b1 p,   q ← b2 q

∇²L u and all ⟨∇ℓ_e, u⟩ come from differentiating ⟨∇L_t, u⟩ once more, with respect to θ and w together, by plain
autograd with attention and head that can be differentiated twice. Central differences of the engine's gradients cost as
much, with errors a hundred times as large, which Adam's division by r enlarges further (experiments/metagradient).
Dropout must be off. The states are float32 like the trainer's; what a step does to the adjoint is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keepset.features.losses import row_losses
from keepset.memory import in_halves
from keepset.model.pack import (
    Batch,
    Row,
    engine,
    last_hidden,
    own_logits,
    pack,
    plan_batches,
    row_counts,
    row_sums,
    token_nll,
)
from keepset.model.pair_losses import pair_loss

Tensors = dict[str, Tensor]

CLIP = 1e-6
"""What torch adds to the norm that it clips by."""


@dataclass(frozen=True)
class Course:
    """What a trainer does with its examples, step by step.

    Attributes:
        batches: (T) the examples (b,) of each optimiser step.
        rates: (T,) learning rates η.
        decay: ω of each trained parameter, by name.
        betas: b1, b2.
        eps: ε.
        max_norm: G; 0: no clipping.
    """

    batches: list[np.ndarray]
    rates: np.ndarray
    decay: dict[str, float]
    betas: tuple[float, float]
    eps: float
    max_norm: float


@dataclass(frozen=True)
class Objective:
    """A loss of examples.

    Attributes:
        examples: n examples as their sides: (row,), or (chosen, rejected).
        loss: `tokens` (summed nats), `sft` (nats a token), `margin` and `mean_margin` (see `features/targets.py`), or
            one of `keepset.model.pair_losses.NAMES`.
        beta: β of a pair loss.
        reference: (n, 2) the sides' log-probabilities under the reference, for pair losses.
    """

    examples: Sequence[tuple[Row, ...]]
    loss: str
    beta: float = 0.1
    reference: np.ndarray | None = None

    def mass(self, indices: np.ndarray) -> np.ndarray:
        """(b,) what a training's mean is divided by: supervised tokens under `tokens`, else 1 an example."""
        if self.loss != "tokens":
            return np.ones(len(indices))
        return np.array([np.count_nonzero(self.examples[i][0].supervised) for i in indices], dtype=np.float64)

    def losses(self, model: Any, indices: np.ndarray, *, twice: bool = False) -> Tensor:
        """(b,) losses, differentiable; `twice`: two times."""
        device = next(model.parameters()).device
        rows = [side for i in indices for side in self.examples[i]]
        batch = pack(rows, np.arange(len(rows)), packed=engine(model).packed, device=device)
        nll = row_sums(token_losses(model, batch, twice), batch.row_of, len(rows)).view(len(indices), -1)
        counts = row_counts(batch.row_of, len(rows)).to(nll.dtype).view(nll.shape)
        if self.loss == "tokens":
            return nll[:, 0]
        if self.loss == "sft":
            return nll[:, 0] / counts[:, 0]
        if self.loss == "margin":
            return nll[:, 0] - nll[:, 1]
        if self.loss == "mean_margin":
            return nll[:, 0] / counts[:, 0] - nll[:, 1] / counts[:, 1]
        assert self.reference is not None
        theirs = torch.as_tensor(self.reference[indices], dtype=nll.dtype, device=device)
        ours = (-nll[:, 0], -nll[:, 1])
        return pair_loss(self.loss, ours, (theirs[:, 0], theirs[:, 1]), (counts[:, 0], counts[:, 1]), beta=self.beta)

    def parts(self, model: Any, indices: np.ndarray, token_budget: int) -> list[np.ndarray]:
        """Positions in `indices` that run together."""
        sizes = [sum(len(side.input_ids) for side in self.examples[i]) for i in indices]
        return plan_batches(sizes, token_budget, engine(model).apart)


def token_losses(model: Any, batch: Batch, twice: bool) -> Tensor:
    """(S,) nats of each supervised token; `twice` (and in float64): through operations that autograd knows."""
    if not twice and next(model.parameters()).dtype != torch.float64:
        return token_nll(model, batch)
    if batch.segments is not None:
        batch = replace(batch, segments=replace(batch.segments, twice=True))
    with sdpa_kernel(SDPBackend.MATH):
        logits = own_logits(model, last_hidden(model, batch)[batch.predict])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(1) - logits.gather(1, batch.labels[:, None])[:, 0]


def reference_logps(model: Any, examples: Sequence[tuple[Row, ...]], *, token_budget: int) -> np.ndarray:
    """(n, 2) log-probabilities of pairs with the adapter off."""
    sides = [side for pair in examples for side in pair]
    return -row_losses(model, sides, token_budget=token_budget, adapters=(False,)).nll[0].reshape(-1, 2)


def weighted_gradient(
    model: Any, names: Sequence[str], objective: Objective, indices: np.ndarray, weights: np.ndarray, token_budget: int
) -> tuple[np.ndarray, Tensors]:
    """Σ_e weight_ek ℓ_e (j,) and its gradient, parameter name to (j, …shape).

    Args:
        model: a PeftModel whose LoRA requires gradients; in eval mode.
        names: of the parameters.
        objective: ℓ.
        indices: (b,) examples.
        weights: (b, j).
        token_budget: tokens that run together; changes the time, not the numbers.
    """
    parameters = [model.get_parameter(name) for name in names]
    j = weights.shape[1]
    values = np.zeros(j)
    sums = {name: p.new_zeros(j, *p.shape) for name, p in zip(names, parameters, strict=True)}

    def add(part: np.ndarray) -> None:
        with torch.enable_grad():
            losses = objective.losses(model, indices[part])
            w = torch.as_tensor(weights[part], dtype=losses.dtype, device=losses.device)
            columns = [torch.autograd.grad((losses * w[:, k]).sum(), parameters, retain_graph=k < j - 1,
                                           materialize_grads=True) for k in range(j)]  # fmt: skip
        values.__iadd__((losses.detach() @ w).double().cpu().numpy())
        for k, column in enumerate(columns):
            for block, grad in zip(sums.values(), column, strict=True):
                block[k].add_(grad)

    for part in objective.parts(model, indices, token_budget):
        in_halves(part, add)
    return values, sums


def curvature(
    model: Any, objective: Objective, indices: np.ndarray, directions: Tensors, token_budget: int
) -> tuple[np.ndarray, Tensors]:
    """Differentiate ⟨∇L, u_k⟩ of a step's mean loss L, for each of j directions u.

    Args:
        model: see `weighted_gradient`.
        objective: the training's.
        indices: (b,) the step's examples.
        directions: parameter name to (j, …shape).
        token_budget: tokens that run together; a part's graph is held for both derivatives.

    Returns:
        (b, j) derivatives ∂⟨∇L, u⟩/∂w at w = 1, and ∇²L u, parameter name to (j, …shape).
    """
    parameters = [model.get_parameter(name) for name in directions]
    total, j = objective.mass(indices).sum(), next(iter(directions.values())).shape[0]
    slopes = np.zeros((len(indices), j))
    products = {name: torch.zeros_like(u) for name, u in directions.items()}

    def add(part: np.ndarray) -> None:
        with torch.enable_grad():
            losses = objective.losses(model, indices[part], twice=True)
            w = torch.ones_like(losses, requires_grad=True)
            mean = (losses * w).sum() / total
            grads = torch.autograd.grad(mean, parameters, create_graph=True, materialize_grads=True)
            columns = []
            for k in range(j):
                along = torch.stack([(g * u[k]).sum() for g, u in zip(grads, directions.values(), strict=True)]).sum()
                columns.append(torch.autograd.grad(along, [w, *parameters], retain_graph=k < j - 1,
                                                   materialize_grads=True))  # fmt: skip
        for k, (slope, *product) in enumerate(columns):
            slopes[part, k] = slope.double().cpu().numpy()
            for block, grad in zip(products.values(), product, strict=True):
                block[k].add_(grad)

    for part in objective.parts(model, indices, token_budget):
        in_halves(part, add)
    return slopes, products


@dataclass(frozen=True)
class State:
    """A training between two steps: parameters and Adam's moments by name, each p numbers in all."""

    theta: Tensors
    m: Tensors
    v: Tensors


@dataclass(frozen=True)
class Taken:
    """A step that was taken: where it started, its gradient before clipping, and the moments after it."""

    theta: Tensors
    gradient: Tensors
    m: Tensors
    v: Tensors


@dataclass
class Adjoint:
    """∂J/∂θ, ∂J/∂m and ∂J/∂v of j losses at a state, parameter name to (j, …shape)."""

    a: Tensors
    p: Tensors
    q: Tensors

    @staticmethod
    def of(gradient: Tensors) -> Adjoint:
        """The adjoint at the end, from the losses' gradients there."""
        return Adjoint(gradient, *({n: torch.zeros_like(g) for n, g in gradient.items()} for _ in range(2)))


class Replay:
    """A training, step by step forwards and backwards."""

    def __init__(self, model: Any, objective: Objective, course: Course, *, token_budget: int = 1024) -> None:
        """Nothing is computed yet.

        Args:
            model: a PeftModel with one LoRA; its trained parameters are those of the course.
            objective: the training's loss, of the examples that the course names.
            course: its steps.
            token_budget: tokens that run together; half as many where the graph is kept for a second derivative.
        """
        self.model, self.objective, self.course = model.eval(), objective, course
        self.names, self.token_budget = list(course.decay), token_budget
        for name in self.names:
            model.get_parameter(name).requires_grad_(True)

    def start(self) -> State:
        """The model as it is, before any step."""
        theta = {n: self.model.get_parameter(n).detach().clone() for n in self.names}
        return State(theta, *({n: torch.zeros_like(x) for n, x in theta.items()} for _ in range(2)))

    @torch.no_grad()
    def put(self, theta: Tensors) -> None:
        """Set the model's parameters."""
        for name, x in theta.items():
            self.model.get_parameter(name).copy_(x)

    @torch.no_grad()
    def forward(self, state: State, t: int, weights: np.ndarray | None = None) -> tuple[State, Taken]:
        """Take step t (from 0), as torch's AdamW does.

        Args:
            state: before it.
            t: the step.
            weights: (n,) of the examples; None: all 1. Where all of a step's are 0, its gradient is 0.
        """
        course, indices = self.course, self.course.batches[t]
        w = np.ones(len(indices)) if weights is None else np.asarray(weights)[indices]
        self.put(state.theta)
        kept = np.flatnonzero(w)
        _, sums = weighted_gradient(
            self.model,
            self.names,
            self.objective,
            indices[kept],
            w[kept, None] / self.objective.mass(indices).sum(),
            self.token_budget,
        )
        gradient = {n: g[0] for n, g in sums.items()}
        coefficient, _ = clipping(gradient, course.max_norm)
        (b1, b2), rate = course.betas, float(course.rates[t])
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        theta, m, v = {}, {}, {}
        for n, g in gradient.items():
            clipped = g * coefficient
            m[n] = state.m[n].lerp(clipped, 1 - b1)
            v[n] = (state.v[n] * b2).addcmul_(clipped, clipped, value=1 - b2)
            denominator = v[n].sqrt().div_(c2**0.5).add_(course.eps)
            theta[n] = (state.theta[n] * (1 - rate * course.decay[n])).addcdiv_(m[n], denominator, value=-rate / c1)
        return State(theta, m, v), Taken(state.theta, gradient, m, v)

    def run(self, state: State, first: int, last: int) -> tuple[State, list[Taken]]:
        """Take the steps first to last − 1 and return what each needs on the way back: 4p numbers a step."""
        taken = []
        for t in range(first, last):
            state, step = self.forward(state, t)
            taken.append(step)
        return state, taken

    def gradient_of(self, goal: Objective, state: State, weights: np.ndarray) -> tuple[np.ndarray, Tensors]:
        """J (j,) at a state, and its gradient, parameter name to (j, …shape).

        Args:
            goal: the loss of the target's examples (m).
            state: where.
            weights: (m, j) of them in each J.
        """
        self.put(state.theta)
        return weighted_gradient(self.model, self.names, goal, np.arange(len(weights)), weights, self.token_budget)

    @torch.no_grad()
    def back(self, taken: Taken, t: int, adjoint: Adjoint) -> tuple[Adjoint, np.ndarray]:
        """From the adjoint after step t to the one before it, and ∂J/∂w (b, j) of the step's examples."""
        dtype = next(iter(taken.theta.values())).dtype
        before, u = undo_adamw(self.course, taken, t, adjoint)
        self.put(taken.theta)
        directions = {n: x.to(dtype) for n, x in u.items()}
        indices = self.course.batches[t]
        slopes, products = curvature(self.model, self.objective, indices, directions, max(1, self.token_budget // 2))
        a = {n: (before.a[n] + x.double()).to(dtype) for n, x in products.items()}
        p, q = ({n: x.to(dtype) for n, x in part.items()} for part in (before.p, before.q))
        return Adjoint(a, p, q), slopes


def clipping(gradient: Tensors, max_norm: float) -> tuple[float, float]:
    """The factor that clipping by global norm puts before a gradient, at most 1, and the gradient's norm."""
    norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    return (min(1.0, max_norm / (norm + CLIP)) if max_norm > 0 else 1.0), norm


def undo_adamw(course: Course, taken: Taken, t: int, adjoint: Adjoint) -> tuple[Adjoint, Tensors]:
    """The adjoint before step t (from 0), its `a` without ∇²L u, and u = ∂J/∂g, (j, …shape) float64 each."""
    (b1, b2), rate = course.betas, float(course.rates[t])
    c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    coefficient, norm = clipping(taken.gradient, course.max_norm)
    before, u = Adjoint({}, {}, {}), {}
    for n, gradient in taken.gradient.items():
        a, m, v = adjoint.a[n].double(), taken.m[n].double(), taken.v[n].double()
        r = (v / c2).sqrt() + course.eps
        p = adjoint.p[n].double() - rate / c1 * a / r
        q = adjoint.q[n].double() + a * torch.where(v > 0, rate / c1 * m / (2 * r**2 * (v * c2).sqrt()), 0.0)
        u[n] = (1 - b1) * p + 2 * (1 - b2) * coefficient * gradient.double() * q
        before.a[n], before.p[n], before.q[n] = (1 - rate * course.decay[n]) * a, b1 * p, b2 * q
    if coefficient < 1:
        g = {n: x.double() for n, x in taken.gradient.items()}
        along = torch.stack([(x * g[n]).flatten(1).sum(1) for n, x in u.items()]).sum(0) * coefficient
        along /= norm * (norm + CLIP)
        u = {n: coefficient * x - torch.einsum("j,...->j...", along, g[n]) for n, x in u.items()}
    return before, u
