"""Fragments as tiles: how a flat vector is cut, and which values of each tile are the largest.

A tile has at most 64 x 64 values, so that the largest are taken from all over a fragment (DeMo's chunks, SparseLoCo).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from braniac.protocol import limits
from braniac.protocol.bitpack import Int32Array, Int64Array

_BLOCK_VALUES = 1 << 16  # read at a time when selecting: what is made of them stays in a core's cache


@dataclass(frozen=True)
class TileLayout:
    """How a fragment's flat vector is cut into tiles: runs of (values per tile, number of such tiles)."""

    groups: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        assert self.groups
        assert all(0 < s <= limits.TILE_SIZE_MAX and c > 0 for s, c in self.groups)
        assert self.tiles <= limits.FRAGMENT_TILES_MAX

    @property
    def tiles(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def size(self) -> int:
        """Values in the fragment."""
        return sum(size * count for size, count in self.groups)

    def tile_sizes(self) -> Int64Array:
        """[tiles] values in each tile."""
        sizes, counts = zip(*self.groups, strict=True)
        return np.repeat(np.asarray(sizes, np.int64), counts)

    def tile_starts(self) -> Int64Array:
        """[tiles] position of each tile's first value in the flat vector."""
        sizes = self.tile_sizes()
        return np.cumsum(sizes) - sizes

    def capacity(self, per_tile: int) -> Int64Array:
        """[tiles] the most values a tile may carry: `per_tile` of 4096, in proportion for smaller tiles."""
        sizes = self.tile_sizes()
        return np.clip(-(-sizes * per_tile // limits.TILE_SIZE_MAX), 1, sizes)


@dataclass(frozen=True)
class Sparse:
    """A fragment with few non-zero values: increasing `positions` and fixed-point `values`, both [n]."""

    positions: Int64Array
    values: Int32Array

    def __len__(self) -> int:
        return len(self.positions)

    def dense(self, size: int) -> Int64Array:
        """[size] int64 with zeros elsewhere."""
        out = np.zeros(size, np.int64)
        out[self.positions] = self.values
        return out


EMPTY = Sparse(np.zeros(0, np.int64), np.zeros(0, np.int32))


def select_topk(layout: TileLayout, vector: Int32Array | Int64Array, per_tile: int) -> Sparse:
    """The largest values of each tile of `vector` [size]; of equal magnitudes the earlier position wins.

    Magnitudes from 2**31 on (2048.0 in fixed point) count as equal.
    """
    assert vector.shape == (layout.size,)
    found, bounds, start = [], [], 0
    for size, count in layout.groups:
        keep = min(size, max(1, -(-size * per_tile // limits.TILE_SIZE_MAX)))
        tiles = vector[start : start + size * count].reshape(count, size)
        for block, bound in _candidates(tiles, keep):
            found.append(block + start)
            bounds.append(bound)
        start += size * count
    chosen = np.concatenate(found)
    magnitude = _magnitude(vector[chosen], np.empty(len(chosen), np.uint32))
    chosen = chosen[_fits(layout, per_tile, chosen, magnitude, np.concatenate(bounds))]
    values = np.clip(vector[chosen], -limits.LEVEL_MAX, limits.LEVEL_MAX).astype(np.int32)
    return Sparse(chosen, values)


def _candidates(tiles: Int32Array | Int64Array, keep: int) -> Iterator[tuple[Int64Array, NDArray[np.uint32]]]:
    """Some tiles at a time: positions of what is no smaller than the `keep`-th largest, maybe more, and that bound."""
    count, size = tiles.shape
    step = min(count, max(1, _BLOCK_VALUES // size))
    # Memory that is used again stays in the cache, and the system need not clear it each time.
    magnitudes, partitioned = np.empty((2, step, size), np.uint32)
    large = np.empty((step, size), bool)
    for at in range(0, count, step):
        rows = min(step, count - at)
        magnitude = _magnitude(tiles[at : at + rows], magnitudes[:rows])
        np.copyto(partitioned[:rows], magnitude)
        partitioned[:rows].partition(size - keep, axis=1)
        bound = np.maximum(partitioned[:rows, size - keep], 1)  # 1 leaves out zeros
        np.greater_equal(magnitude, bound[:, None], out=large[:rows])
        yield np.flatnonzero(large[:rows]) + at * size, bound


def _magnitude(values: Int32Array | Int64Array, out: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Absolute values, at most 2**31."""
    if values.dtype == np.int32:
        np.abs(values, out=out.view(np.int32))  # of -2**31 too: the bits are right
    else:
        np.minimum(np.abs(values), 1 << 31, out=out, casting="unsafe")
    return out


def _fits(
    layout: TileLayout, per_tile: int, chosen: Int64Array, magnitude: NDArray[np.uint32], bounds: NDArray[np.uint32]
) -> NDArray[np.bool_]:
    """Of candidates [n], all but the last of those that equal the bound of a tile with too many."""
    counts = counts_of(layout, chosen)
    surplus = np.maximum(counts - layout.capacity(per_tile), 0)
    at = np.flatnonzero(np.repeat(surplus > 0, counts))
    tile = np.repeat(np.flatnonzero(surplus), counts[surplus > 0])
    tied = magnitude[at] == bounds[tile]
    # Ties are counted from the end: those in this tile from here on, here included.
    from_here = np.cumsum(tied[::-1])[::-1]
    in_tile = np.bincount(tile[tied], minlength=layout.tiles)
    behind = np.cumsum(in_tile[::-1])[::-1] - in_tile
    fits = np.ones(len(chosen), bool)
    fits[at] = ~tied | (from_here - behind[tile] > surplus[tile])
    return fits


def counts_of(layout: TileLayout, positions: Int64Array) -> Int64Array:
    """[tiles] how many of the ascending `positions` lie in each tile."""
    return np.diff(np.searchsorted(positions, layout.tile_starts()), append=len(positions))
