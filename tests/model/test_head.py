"""The LM head: losses and gradients, of a large vocabulary too."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


from keepset.model.head import LogitMap, nll  # noqa: E402
from tolerance import BACKWARD, FORWARD  # noqa: E402


@pytest.mark.parametrize("mapping", [LogitMap(), LogitMap(0.5), LogitMap(1.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_head_value_and_gradient(mapping: LogitMap, bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 700, bias=bias)
    hidden = torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(0, 700, (13,))
    weight = torch.randn(13)
    want = torch.nn.functional.cross_entropy(mapping(head(hidden)), labels, reduction="none")
    grads = torch.autograd.grad((want * weight).sum(), [hidden, *head.parameters()])
    got = nll(hidden, labels, head, mapping, chunk=13 * 300)
    torch.testing.assert_close(got, want, rtol=FORWARD, atol=FORWARD)
    mine = torch.autograd.grad((got * weight).sum(), [hidden, *head.parameters()])
    for a, b in zip(mine, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=BACKWARD, atol=FORWARD)


def test_a_large_vocabulary_loses_no_digits() -> None:
    """torch's own float32 loss is biased here; ours must stay with float64."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 262_144, bias=False)
    torch.nn.init.normal_(head.weight)
    hidden, labels = torch.randn(24, 16), torch.randint(0, 262_144, (24,))
    with torch.no_grad():
        exact = torch.nn.functional.cross_entropy(hidden.double() @ head.weight.double().T, labels, reduction="none")
        got = nll(hidden, labels, head, chunk=24 * 50_000)
    assert (got - exact).abs().max() < 8e-6
    assert abs((got - exact).sum().item() / exact.sum().item()) < 2e-7
