"""Packed attention: no row sees another."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


from keepset.model.attention import Segments, packed_attention  # noqa: E402


def test_no_row_sees_another() -> None:
    """The gradient of one row's loss touches no other row's embeddings."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 4, requires_grad=True) for h in (4, 2, 2))
    out = packed_attention(q, k, v, Segments.of([4, 3, 2]))
    out[:, 4:7].sum().backward()
    for x in (q, k, v):
        assert x.grad[:, :, 4:7].abs().sum() > 0
        assert x.grad[:, :, :4].abs().sum() == 0 and x.grad[:, :, 7:].abs().sum() == 0
