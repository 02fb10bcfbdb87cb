"""Pair losses against TRL's, finite differences and hand-worked numbers; training with them."""

from __future__ import annotations

import math

import pytest
import torch

from keepset.model import pair_losses as losses

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(m=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: -(torch.rand(m, generator=g, dtype=torch.float64) * 40 + 1)  # noqa: E731
    policy, reference = (draw(), draw()), (draw(), draw())
    counts = tuple(torch.randint(1, 30, (m,), generator=g).double() for _ in range(2))
    return policy, reference, counts


def test_by_hand():
    t = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    policy, reference, counts = (t(-8.0), t(-6.0)), (t(-10.0), t(-5.0)), (t(4.0), t(2.0))
    # log-ratios +2 and -1
    assert losses.dpo_loss(*policy, *reference, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    # S_w = 1 - 8/10, S_l = 1 - 6/5
    assert losses.davir_logit(*policy, *reference).item() == pytest.approx(0.2 + 0.2)
    assert losses.davir_dpo_loss(*policy, *reference, beta=10).item() == pytest.approx(math.log(1 + math.exp(-4)))
    # means +.5 and -.5
    assert losses.ipo_loss(*policy, *reference, *counts, beta=0.1).item() == pytest.approx((1 - 5) ** 2)
    assert losses.dpo_mean_loss(*policy, *reference, *counts, beta=2).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    smoothed = losses.dpo_loss(*policy, *reference, beta=0.5, label_smoothing=0.25).item()
    assert smoothed == pytest.approx(0.75 * math.log(1 + math.exp(-1.5)) + 0.25 * math.log(1 + math.exp(1.5)))
    # -2 against -3
    assert losses.simpo_loss(*policy, *counts, beta=2, gamma=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize("name", losses.NAMES)
def test_gradient_against_finite_differences(name):
    policy, reference, counts = numbers()
    leaf = torch.stack(policy).requires_grad_()
    f = lambda x: losses.pair_loss(name, (x[0], x[1]), reference, counts, beta=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: f(x).sum(), (leaf,), eps=1e-6, atol=1e-8)
    # ... and every loss falls when the chosen side gains (IPO: as long as its margin is below 1/(2β)).
    if name != "ipo":
        grad = torch.autograd.grad(f(leaf).sum(), leaf)[0]
        assert (grad[0] < 0).all() and (grad[1] > 0).all()


def test_at_the_start():
    policy, _, counts = numbers()
    for name in ("dpo", "davir", "dpo_mean"):
        got = losses.pair_loss(name, policy, policy, counts, beta=3.0)
        assert got.tolist() == pytest.approx([math.log(2)] * 6)
    assert losses.pair_loss("ipo", policy, policy, counts, beta=0.5).tolist() == pytest.approx([1.0] * 6)


def test_davir_is_the_difference_of_scores_and_the_same_for_means():
    from keepset.methods.davir import davir

    policy, reference, counts = numbers()
    score = [torch.from_numpy(davir(-reference[k].numpy(), -policy[k].numpy())) for k in range(2)]
    assert torch.allclose(losses.davir_logit(*policy, *reference), score[0] - score[1])
    means = losses.davir_logit(*(p / n for p, n in zip(policy, counts, strict=True)),
                               *(r / n for r, n in zip(reference, counts, strict=True)))  # fmt: skip
    assert torch.allclose(means, losses.davir_logit(*policy, *reference))


def test_davir_denominators_carry_no_gradient():
    policy, reference, _ = numbers()
    held = [r.clone().requires_grad_() for r in reference]
    moved = [p.clone().requires_grad_() for p in policy]
    losses.davir_dpo_loss(*moved, *held, beta=2.0).sum().backward()
    assert all(h.grad is None for h in held) and all(m.grad.abs().min() > 0 for m in moved)
