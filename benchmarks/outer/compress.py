"""What several methods share: top-k per 64x64 tile, the statistical quantiser, a 4-bit float, the DCT of a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 64
INDEX_BITS = 12
"""Of a place in a 64x64 tile."""


@dataclass(frozen=True)
class Chosen:
    """Some values of each tile."""

    places: Tensor
    """int64 [tiles, k], within the tile."""
    values: Tensor
    """float32 [tiles, k]."""

    def dense(self, tile: int) -> Tensor:
        """float32 [tiles, tile], with zeros elsewhere."""
        return torch.zeros(len(self.values), tile).scatter_(1, self.places, self.values)


def top_k(tiles: Tensor, k: int) -> Chosen:
    """The k values of largest magnitude of each row of `tiles`, float32 [tiles, values]."""
    places = tiles.abs().topk(k, dim=1).indices
    return Chosen(places, tiles.gather(1, places))


def contributor_mean(tile: int, contributions: Sequence[Chosen]) -> Tensor:
    """Each value's mean over those who sent it, not over everybody; float32 [tiles, tile], 0 where nobody did."""
    total = torch.stack([chosen.dense(tile) for chosen in contributions]).sum(0)
    count = torch.stack([Chosen(c.places, torch.ones_like(c.values)).dense(tile) for c in contributions]).sum(0)
    return total / count.clamp_min(1)


def quantise(rows: Tensor, bins: int = 4, sigmas: float = 6.0) -> Tensor:
    """The statistical quantiser of templar and MuLoCo: equal bins around each row's mean, read back as bin means.

    `rows` float32 [rows, values]; the bins are `sigmas` standard deviations wide together, and outliers belong to the
    outermost.
    """
    centred = rows - rows.mean(1, keepdim=True)
    deviation = centred.norm(dim=1, keepdim=True) / math.sqrt(max(1, rows.shape[1] - 1))
    width = sigmas * deviation / bins
    width = torch.where(width > 0, width, torch.ones_like(width))
    code = (centred / width + bins // 2).round().clamp(0, bins - 1).long()
    total = torch.zeros(len(rows), bins).scatter_add_(1, code, rows)
    count = torch.zeros(len(rows), bins).scatter_add_(1, code, torch.ones_like(rows))
    return (total / count.clamp_min(1)).gather(1, code)


def float4(rows: Tensor) -> Tensor:
    """The nearest 4-bit float (E3M0: a sign and a power of two, or 0), each row scaled so that its largest fits."""
    largest = rows.abs().amax(1, keepdim=True)
    ratio = rows.abs() / torch.where(largest > 0, largest, torch.ones_like(largest))
    lowest = 2.0**-6  # seven powers of two and zero: three bits
    power = torch.exp2(torch.floor(torch.log2(ratio.clamp_min(lowest / 2) / 0.75))).clamp(lowest, 1.0)
    return torch.where(ratio < lowest / 2, torch.zeros_like(power), power) * rows.sign() * largest


def dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 64 values, float32 [64, 64]: C x transforms, C^T y takes back."""
    n = torch.arange(SIDE, dtype=torch.float64)
    matrix = torch.cos(math.pi / SIDE * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / SIDE)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def transform(flat: Tensor, matrix: Tensor) -> Tensor:
    """Two-dimensional transform of every tile of a flat vector: float32 [tiles, 4096].

    `matrix` is that of the DCT, or its transpose for the inverse.
    """
    return (matrix @ flat.view(-1, SIDE, SIDE) @ matrix.T).reshape(-1, SIDE * SIDE)
