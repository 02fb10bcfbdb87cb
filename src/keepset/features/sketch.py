"""The count sketch behind the gradient store: where each coordinate goes and with which sign, from an integer hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepset.errors import RecipeError

CACHED = 1 << 24
"""Coordinates whose slots are kept in memory (9 bytes each); beyond them they are computed again for every batch."""


@dataclass(frozen=True)
class Sketch:
    """A random projection to `dim` numbers, addressed by seed, parameter name and coordinate.

    Attributes:
        dim: numbers per vector, k.
        seed: another seed, another projection.
    """

    dim: int
    seed: int = 0
    kept: dict[tuple[str, int, int, str], tuple[Tensor, Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check the dimension.

        Raises:
            RecipeError: not in 1 .. 2³¹ − 1.
        """
        if not 0 < self.dim < 1 << 31:
            raise RecipeError(f"sketch dimension {self.dim}: must be at least 1")

    def slots(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Bucket (int64, 0..k−1) and sign (int8, ±1) of the coordinates start:stop of a parameter.

        The hash is SplitMix64's finaliser (Steele et al. 2014) of coordinate + key, in wrapping 64-bit integers.
        """
        key = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little", signed=True)
        x = torch.arange(start, stop, device=device, dtype=torch.int64)
        x = x * _signed(0x9E3779B97F4A7C15) + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
        sign = ((x & 1) * 2 - 1).to(torch.int8)
        bucket = ((x >> 32) & 0x7FFFFFFF).remainder_(self.dim)
        return bucket, sign

    def add_(self, out: Tensor, name: str, values: Tensor, start: int) -> Tensor:
        """Add the sketch of some coordinates of n vectors.

        `out` (n, k) is added to; `values` (n, m) are the coordinates start:start+m, and stay as they are.
        """
        stop = start + values.shape[1]
        key = name, start, stop, str(values.device)
        slots = self.kept.get(key)
        if slots is None:
            slots = self.slots(name, start, stop, values.device)
            if sum(s.numel() for _, s in self.kept.values()) + stop - start <= CACHED:
                self.kept[key] = slots
        return out.index_add_(1, slots[0], values * slots[1])


def _signed(x: int) -> int:
    """The 64-bit pattern as a signed integer."""
    return x - (1 << 64) if x >= 1 << 63 else x
