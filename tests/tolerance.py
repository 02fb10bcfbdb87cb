"""How far two float32 computations of one number may lie apart, on any processor.

Kernels sum in other orders: with AVX2, AVX-512 or neither, with one thread or two. The error of a sum of n terms grows
like √n · u, u = half of the dtype's eps (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis";
λ = 2 of theirs, and kernels that sum in blocks stay far below). What follows multiplies it by its condition: the
relative change of the result over that of what went in.

Tests take these numbers with the size that the errors are relative to: a row's own loss, a gradient's norm or largest
element. Formulas in float64 and what is rounded for display have tolerances of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def tolerance(terms: int, condition: float = 1.0, dtype: Any = np.float32) -> float:
    """Relative error of a chain of sums over so many terms in all."""
    return float(2 * np.sqrt(terms) * np.finfo(dtype).eps / 2 * condition)


# The sums of one token's way through `conftest.tiny_model`: two layers of hidden size 32 (norms, projections, attention
# over at most 64 tokens, an MLP of 64), the head and a softmax over 320.
TERMS = 2 * (2 * 32 + 4 * 32 + 64 + 32 + 64) + 32 + 32 + 320
# Losses, log-probabilities, hidden states: 4e-6.
FORWARD = tolerance(TERMS)
# Gradients: each sum once more for the inputs and once for the weights; the softmax's backward and the norms' subtract
# what nearly cancels: 3e-5 of the largest element or of the norm.
BACKWARD = tolerance(3 * TERMS, condition=4)
# Gradients divided by the square roots of second moments (random ones, which span some orders of magnitude): 6e-5.
MAPPED = 2 * BACKWARD


def trained(learning_rate: float, steps: int) -> float:
    """Absolute error of weights after some steps of Adam.

    Its first steps have the size of the learning rate in every coordinate, whatever the gradient's: one whose gradient
    is a hundredth of the largest has two digits less.
    """
    return learning_rate * steps * BACKWARD * 100


def condition(value: Any, *inputs: Any) -> float:
    """Σ |x · ∂value/∂x| / |value|: how many times the inputs' relative errors a scalar function's is (torch)."""
    import torch

    slopes = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    moved = sum(float((x * g).abs().sum()) for x, g in zip(inputs, slopes, strict=True) if g is not None)
    return moved / abs(float(value.detach()))
