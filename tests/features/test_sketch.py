"""The projection: any slice of it is the same, its values are fixed, its dot products unbiased."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from keepset.features.sketch import Sketch  # noqa: E402
from tolerance import FORWARD  # noqa: E402

BUCKETS, SIGNS = [16, 25, 5, 57, 20, 22], [1, -1, -1, -1, -1, 1]


def test_any_slice_is_the_same_and_values_are_fixed() -> None:
    sketch = Sketch(100, seed=3)
    bucket, sign = sketch.slots("layer.A", 0, 1000)
    for start, stop in ((0, 1), (17, 500), (999, 1000)):
        b, s = sketch.slots("layer.A", start, stop)
        assert b.equal(bucket[start:stop]) and s.equal(sign[start:stop])
    # written down once: a change of hash would make every existing store wrong
    assert bucket[:6].tolist() == BUCKETS and sign[:6].tolist() == SIGNS
    assert not Sketch(100, seed=4).slots("layer.A", 0, 1000)[0].equal(bucket)
    assert not sketch.slots("layer.B", 0, 1000)[0].equal(bucket)


def test_hash_against_python_integers() -> None:
    """SplitMix64's finaliser in unbounded integers."""
    import hashlib

    sketch, mask = Sketch(777, seed=9), (1 << 64) - 1
    key = int.from_bytes(hashlib.sha256(b"9:w").digest()[:8], "little")
    bucket, sign = sketch.slots("w", 5, 25)
    for k, i in enumerate(range(5, 25)):
        x = (i * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        assert int(bucket[k]) == ((x >> 32) & 0x7FFFFFFF) % 777 and int(sign[k]) == (x & 1) * 2 - 1


def test_buckets_and_signs_are_even_and_dots_unbiased() -> None:
    bucket, sign = Sketch(64).slots("w", 0, 200_000)
    counts = np.bincount(bucket.numpy(), minlength=64)
    assert abs(counts / 3125 - 1).max() < 0.1 and abs(sign.float().mean()) < 0.01
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((1, 3000)).astype(np.float32)) for _ in range(2))
    b = b + a
    found = []
    for seed in range(200):
        sketch = Sketch(256, seed)
        x, y = (sketch.add_(torch.zeros(1, 256), "w", v, 0) for v in (a, b))
        found.append(float((x * y).sum()))
    exact, spread = float((a * b).sum()), float(a.norm() * b.norm()) * np.sqrt(2 / 256)
    assert abs(np.mean(found) - exact) < 4 * spread / np.sqrt(200)
    assert np.std(found) < 1.2 * spread


def test_pieces_add_up() -> None:
    sketch, v = Sketch(32), torch.randn(2, 90)
    whole = sketch.add_(torch.zeros(2, 32), "w", v, 0)
    parts = torch.zeros(2, 32)
    for start in range(0, 90, 40):
        sketch.add_(parts, "w", v[:, start : start + 40], start)
    assert torch.allclose(whole, parts, atol=4 * FORWARD)
