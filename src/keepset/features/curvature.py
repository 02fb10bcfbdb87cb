"""Target vectors multiplied by an inverse curvature, at one checkpoint: what influence functions put where v stood.

    S(z) = <∇ℓ(z), r_j>,   r_j ≈ (F + λI)⁻¹ v_j,   F = mean over the curvature rows of g gᵀ

    fisher    F itself, through the rows' Gram matrix: exact            methods/influence.py
    cg        the rows' Gauss-Newton matrix instead of F, exact too,    features/gauss_newton.py
              by conjugate gradients
    datainf   each matrix's mean of single-row inverses                 methods/datainf.py
    ekfac     each matrix's eigenvalue-corrected Kronecker factors      methods/ekfac.py
              with one λ for all matrices; `ekfac-matrix`: one for each

g: gradients of rows' mean token loss on the LoRA matrices; with labels drawn from the model F estimates Gauss-Newton.
The solve is done once, on the target: the pass over the pool is the same as TracIn's, and shared with it. `datainf` and
`ekfac` pass over the curvature rows twice and hold nothing of size rows x parameters; `fisher` holds exactly that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keepset.errors import ModelError, RecipeError
from keepset.features.gauss_newton import GaussNewton
from keepset.features.recorded import Sink
from keepset.features.row_gradients import Labels, each_gradient, run_batches, stacked_gradients, weighted_gradients
from keepset.features.solvers import cg_solve, datainf_shares, eigenvectors, ekfac_solve, fisher_coefficients
from keepset.features.targets import GradientTarget
from keepset.model.layout import Places
from keepset.model.pack import Row

MEMORY = 1 << 31
"""Bytes of gradients that `fisher` may hold (2 GiB): curvature rows x parameters x 4."""
TOLERANCE, STEPS = 1e-2, 200
"""Of conjugate gradients: residual over the target's norm, and products spent on a target."""


def solve_target(
    model: nn.Module,
    target: GradientTarget,
    rows: Sequence[Row],
    *,
    solver: str,
    labels: Labels = "sampled",
    damping: float = 0.1,
    token_budget: int = 1024,
    seed: int = 0,
    last_layers: int | None = None,
) -> GradientTarget:
    """Return the target with every vector v_j replaced by r_j.

    Args:
        model: a PeftModel at the checkpoint the target was formed at, in eval mode.
        target: of `target_vectors`.
        rows: the curvature rows.
        solver: see the module docstring.
        labels: `data`, or `sampled` from the model.
        damping: λ over a mean eigenvalue of F: over all (`ekfac`), those of the matrix alone (`datainf`,
            `ekfac-matrix`), or those that so few rows can make non-zero (`fisher`, `cg`).
        token_budget: tokens a batch holds; changes the time, not the numbers.
        seed: of drawn labels.
        last_layers: only the top so many layers' matrices; the target must have been formed so too.

    Raises:
        RecipeError: unknown solver, damping not above 0, more gradients than `fisher` may hold, or conjugate gradients
            that don't converge.
        ModelError: the rows have no gradient at all.
    """
    solvers: dict[str, Callable[..., dict[str, Tensor]]] = {
        "fisher": _fisher,
        "cg": _cg,
        "datainf": _datainf,
        "ekfac": _ekfac,
        "ekfac-matrix": partial(_ekfac, by_matrix=True),
    }
    if solver not in solvers:
        raise RecipeError(f"unknown curvature solver '{solver}'; known: {', '.join(solvers)}")
    if not damping > 0:
        raise RecipeError(f"damping {damping}: must be above 0")
    options = dict(token_budget=token_budget, labels=labels, seed=seed, last_layers=last_layers)
    blocks = solvers[solver](model, target, rows, damping, options)
    return replace(target, blocks=blocks)


def _fisher(
    model: nn.Module, target: GradientTarget, rows: Sequence[Row], damping: float, options: dict
) -> dict[str, Tensor]:
    p = sum(b[0].numel() for b in target.blocks.values())
    if 4 * p * len(rows) > MEMORY:
        raise RecipeError(
            f"influence: {len(rows)} curvature rows x {p} LoRA numbers take {4 * p * len(rows) / 2**30:.1f} GiB, above "
            f"{MEMORY / 2**30:g}; set curvature_rows to at most {MEMORY // (4 * p)}, or take ekfac or datainf"
        )
    g = stacked_gradients(model, rows, **options)
    gram = sum(x.double() @ x.double().T for x in g.values())
    dots = sum(g[n].double() @ v.flatten(1).double().T for n, v in target.blocks.items())
    assert isinstance(gram, Tensor) and isinstance(dots, Tensor)
    lam = damping * float(gram.trace()) / len(rows) / min(len(rows), p)
    if not lam > 0:
        raise ModelError("the curvature rows have no gradient at all at this checkpoint")
    c = torch.as_tensor(fisher_coefficients(gram.cpu().numpy(), dots.cpu().numpy(), damping=lam)).to(gram.device)
    return {n: ((v.double() - (c.T @ g[n].double()).view(v.shape)) / lam).float() for n, v in target.blocks.items()}


def _cg(
    model: nn.Module, target: GradientTarget, rows: Sequence[Row], damping: float, options: dict
) -> dict[str, Tensor]:
    """λ from Gauss-Newton's trace, estimated by one draw of labels: with weights 1/T it is the mean of T·‖g‖²."""
    squares = np.zeros(len(rows))

    def visit(name: str, indices: np.ndarray, g: Tensor) -> None:
        flat = g.flatten(1)
        squares[indices] += torch.linalg.vecdot(flat, flat).double().cpu().numpy()

    each_gradient(model, rows, visit, **{**options, "labels": "sampled"})
    lengths = np.array([np.count_nonzero(r.supervised) for r in rows])
    names, shapes = list(target.blocks), [b.shape for b in target.blocks.values()]
    sizes = [b[0].numel() for b in target.blocks.values()]
    lam = damping * float((squares * lengths).mean()) / min(len(rows), sum(sizes))
    if not lam > 0:
        raise ModelError("the curvature rows have no gradient at all at this checkpoint")
    product = GaussNewton(model, rows, names, token_budget=options["token_budget"], damping=lam)
    v = torch.cat([b.flatten(1) for b in target.blocks.values()], 1).double().cpu().numpy()
    try:
        r = torch.as_tensor(cg_solve(product, v, tolerance=TOLERANCE, max_steps=STEPS), dtype=torch.float32)
    except ValueError as error:
        raise RecipeError(f"influence: {error}") from None
    pieces = r.split(sizes, 1)
    return {n: x.reshape(s).to(target.blocks[n].device) for n, x, s in zip(names, pieces, shapes, strict=True)}


def _datainf(
    model: nn.Module, target: GradientTarget, rows: Sequence[Row], damping: float, options: dict
) -> dict[str, Tensor]:
    squares: dict[str, np.ndarray] = {n: np.zeros(len(rows)) for n in target.blocks}
    dots = {n: np.zeros((len(rows), target.n_targets)) for n in target.blocks}

    def visit(name: str, indices: np.ndarray, g: Tensor) -> None:
        flat = g.flatten(1)
        squares[name][indices] = torch.linalg.vecdot(flat, flat).double().cpu().numpy()
        dots[name][indices] = (flat @ target.blocks[name].flatten(1).to(flat.device).T).double().cpu().numpy()

    shapes = each_gradient(model, rows, visit, **options)
    shares, lam = {}, {}
    for name, (a, b) in shapes.items():
        shares[name], lam[name] = datainf_shares(dots[name], squares[name], a * b, damping=damping)
    if not any(lam.values()):
        raise ModelError("the curvature rows have no gradient at all at this checkpoint")
    sums = weighted_gradients(model, rows, shares, **options)
    # a matrix without any gradient (lora_A while lora_B is 0) adds nothing to any row's score
    return {
        n: (v - sums[n] / len(rows)) / lam[n] if lam[n] > 0 else torch.zeros_like(v) for n, v in target.blocks.items()
    }


def kronecker_factors(model: nn.Module, rows: Sequence[Row], **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ a aᵀ (b, b) and Σ δ δᵀ (a, a) of every matrix (a, b), float64, over all tokens of the rows."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, left: Tensor, right: Tensor, scale: float, places: Places) -> None:
        own, shared = right[places.prefix :], right[: places.prefix]
        inputs = (own.T @ own + len(places.lengths) * (shared.T @ shared)).double()
        outputs = (left.T @ left).double() * scale**2
        old = factors.get(name)
        factors[name] = (inputs, outputs) if old is None else (old[0] + inputs, old[1] + outputs)

    def sink_of(indices: np.ndarray) -> Sink:
        return add

    run_batches(model, rows, sink_of, **options)
    return factors


def _ekfac(
    model: nn.Module,
    target: GradientTarget,
    rows: Sequence[Row],
    damping: float,
    options: dict,
    by_matrix: bool = False,
) -> dict[str, Tensor]:
    factors = kronecker_factors(model, rows, **options)
    bases = {n: (eigenvectors(a.cpu().numpy()), eigenvectors(b.cpu().numpy())) for n, (a, b) in factors.items()}
    turned = {
        n: tuple(torch.as_tensor(q, dtype=torch.float32, device=target.blocks[n].device) for q in pair)
        for n, pair in bases.items()
    }
    eigenvalues: dict[str, Tensor] = {n: torch.zeros(b.shape[1:]).double() for n, b in target.blocks.items()}

    def visit(name: str, indices: np.ndarray, g: Tensor) -> None:
        q_a, q_b = turned[name]
        eigenvalues[name] += (q_b.T @ g @ q_a).double().square_().sum(0).cpu() / len(rows)

    each_gradient(model, rows, visit, **options)
    if not any(bool(e.any()) for e in eigenvalues.values()):
        raise ModelError("the curvature rows have no gradient at all at this checkpoint")
    overall = float(torch.cat([e.flatten() for e in eigenvalues.values()]).mean())
    solved = {}
    for name, v in target.blocks.items():
        values = eigenvalues[name].numpy()
        if not values.any():  # see _datainf
            solved[name] = torch.zeros_like(v)
            continue
        lam = damping * (float(values.mean()) if by_matrix else overall)
        r = ekfac_solve(v.double().cpu().numpy(), *bases[name], values, damping=lam)
        solved[name] = torch.as_tensor(r, dtype=v.dtype, device=v.device)
    return solved
