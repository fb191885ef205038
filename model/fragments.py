"""The fragment table: every parameter cut into 64x64 tiles, tiles dealt out to fragments that never straddle a ring.

A fragment is the unit of averaging, hashing and download. Its parameters, tile after tile and each tile row-major, form
one flat vector; that order is part of the protocol, so `layout_digest` lets peers with another table find out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.initial import initial_units
from braniac.model.rounding import Dice, round_into_
from braniac.model.tiers import is_sliced, parameter_shapes, ring_rows

TILE_SIDE = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of one parameter, at most 64x64; smaller at the edge of a ring or tensor that 64 does not divide.

    A vector counts as one row.
    """

    tensor: str
    row0: int
    rows: int
    col0: int
    cols: int

    @property
    def size(self) -> int:
        """Parameters in the tile."""
        return self.rows * self.cols


_Places = npt.NDArray[np.int32]


class _Tiles(Sequence[Tile]):
    """Many tiles in 20 bytes each: the quarter of a million in a billion parameters would be 30 MB of objects."""

    def __init__(self, names: tuple[str, ...], places: _Places) -> None:
        """`places` are int32 [tiles, 5]: number of the tensor's name, then the fields of `Tile` after it."""
        self._names = names
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tiles):
            return NotImplemented
        return self._names == other._names and np.array_equal(self._places, other._places)

    def __hash__(self) -> int:
        return hash((self._names, self._places.tobytes()))

    @overload
    def __getitem__(self, index: int) -> Tile: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tile]: ...

    def __getitem__(self, index: int | slice) -> Tile | Sequence[Tile]:
        if isinstance(index, slice):
            return _Tiles(self._names, self._places[index])
        name, *numbers = self._places[index].tolist()
        return Tile(self._names[name], *numbers)

    def __iter__(self) -> Iterator[Tile]:
        for name, *numbers in self._places.tolist():
            yield Tile(self._names[name], *numbers)


@dataclass(frozen=True)
class Fragment:
    """A fixed set of tiles of one ring. `index` is its place in the round-robin order of the slots."""

    index: int
    ring: int
    tiles: Sequence[Tile]
    """Largest first, so that equal sizes are contiguous."""

    @functools.cached_property
    def size(self) -> int:
        """Parameters in the fragment."""
        return sum(tile.size for tile in self.tiles)

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of equal tiles as (tile size, count); they cover the flat vector from its start to its end."""
        return tuple((size, len(list(run))) for size, run in itertools.groupby(self.tiles, key=lambda tile: tile.size))

    def spans(self) -> Iterator[tuple[Tile, int, int]]:
        """Each tile with its first and one-past-last place in the flat vector."""
        stop = 0
        for tile in self.tiles:
            start, stop = stop, stop + tile.size
            yield tile, start, stop


def fragment_table(config: ModelConfig, fragments: int) -> tuple[Fragment, ...]:
    """Cut the whole model into `fragments` fragments of nearly equal size. Raises ConfigError if that is impossible."""
    if fragments < config.tiers:
        raise ConfigError(f"{fragments} fragments cannot keep the {config.tiers} rings of this model apart: use more.")
    rings = [_ring_tiles(config, ring) for ring in range(config.tiers)]
    sizes = [int((places[:, 2] * places[:, 4]).sum()) for _, places in rings]
    placed: list[tuple[float, int, _Tiles]] = []
    for ring, ((names, places), share) in enumerate(zip(rings, _shares(sizes, fragments), strict=True)):
        if share > len(places):
            raise ConfigError(
                f"{fragments} fragments are too many: ring {ring} has {len(places)} tiles for {share} of them."
            )
        # Dealing tiles like cards gives each fragment a part of every layer. The middle of the fragment's turn, as
        # a fraction of the window, then spreads each ring evenly over the slots.
        placed += [((2 * i + 1) / (2 * share), ring, _Tiles(names, places[i::share].copy())) for i in range(share)]
    placed.sort(key=lambda entry: entry[:2])
    return tuple(Fragment(index, ring, tiles) for index, (_, ring, tiles) in enumerate(placed))


def _ring_tiles(config: ModelConfig, ring: int) -> tuple[tuple[str, ...], _Places]:
    """All tiles of a ring: largest first, then in canonical order of tensors, rows and columns."""
    shapes = parameter_shapes(config, tier=0)
    found = []
    for number, (name, shape) in enumerate(shapes.items()):
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        if not is_sliced(config, name) and ring > 0:
            continue
        start, stop = ring_rows(config, name, ring) if is_sliced(config, name) else (0, rows)
        row0, col0 = np.meshgrid(np.arange(start, stop, TILE_SIDE), np.arange(0, cols, TILE_SIDE), indexing="ij")
        sides = np.minimum(TILE_SIDE, stop - row0), np.minimum(TILE_SIDE, cols - col0)
        columns = (np.full_like(row0, number), row0, sides[0], col0, sides[1])
        found.append(np.stack([column.ravel() for column in columns], axis=1).astype(np.int32))
    places = np.concatenate(found)
    return tuple(shapes), places[np.argsort(-places[:, 2] * places[:, 4], kind="stable")]


def _shares(sizes: Sequence[int], fragments: int) -> list[int]:
    """Fragments per ring, of which `sizes` are: one each, then one by one to the ring with the largest fragments."""
    shares = [1] * len(sizes)
    for _ in range(fragments - len(sizes)):
        neediest = max(range(len(sizes)), key=lambda ring: (sizes[ring] / shares[ring], -ring))
        shares[neediest] += 1
    return shares


def layout_digest(config: ModelConfig, fragments: int) -> bytes:
    """SHA-256 of the table: equal on two peers exactly if they mean the same parameters by the same places."""
    digest = hashlib.sha256(b"braniac fragment table 2\n")
    for fragment in fragment_table(config, fragments):
        digest.update(f"fragment {fragment.index} ring {fragment.ring}\n".encode())
        for tile in fragment.tiles:
            digest.update(f"{tile.tensor} {tile.row0} {tile.rows} {tile.col0} {tile.cols}\n".encode())
    return digest.digest()


def gather(params: Mapping[str, Tensor], fragment: Fragment) -> Tensor:
    """A copy of the fragment's parameters, float32 [size]."""
    flat = torch.empty(fragment.size)
    with torch.no_grad():
        for tile, start, stop in fragment.spans():
            flat[start:stop].view(tile.rows, tile.cols).copy_(_rectangle(params, tile))
    return flat


def scatter_(params: Mapping[str, Tensor], fragment: Fragment, values: Tensor) -> None:
    """Overwrite the fragment's parameters with `values`, [size]."""
    assert values.shape == (fragment.size,), f"{tuple(values.shape)} for a fragment of {fragment.size}"
    with torch.no_grad():
        for tile, start, stop in fragment.spans():
            _rectangle(params, tile).copy_(values[start:stop].view(tile.rows, tile.cols))


def scatter_add_(params: Mapping[str, Tensor], fragment: Fragment, change: Tensor, dice: Dice | None = None) -> None:
    """Add `change`, float32 [size], to the fragment's parameters; sums for bfloat16 ones are rounded by `dice`."""
    assert change.shape == (fragment.size,), f"{tuple(change.shape)} for a fragment of {fragment.size}"
    with torch.no_grad():
        for tile, start, stop in fragment.spans():
            part = _rectangle(params, tile)
            added = change[start:stop].view(tile.rows, tile.cols).to(part.device)
            if part.dtype == torch.bfloat16:
                assert dice is not None, "a bfloat16 weight would lose most changes"
                round_into_(part, part.float() + added, dice)
            else:
                part.add_(added)


def _rectangle(params: Mapping[str, Tensor], tile: Tile) -> Tensor:
    """The tile as a view; a slice would silently shorten if this tier did not hold the rows, so check."""
    tensor = params[tile.tensor]
    if tensor.dim() == 1:
        tensor = tensor[None]
    assert tile.row0 + tile.rows <= tensor.shape[0], f"{tile.tensor} of this tier ends before row {tile.row0}"
    return tensor[tile.row0 : tile.row0 + tile.rows, tile.col0 : tile.col0 + tile.cols]


def initial_fragment(config: ModelConfig, fragment: Fragment, seed: int) -> npt.NDArray[np.int32]:
    """The fragment's anchor at the start of a run, int32 [size] in units of 2**-20, the same bits on every peer."""
    return np.concatenate(
        [initial_units(config, t.tensor, t.row0, t.rows, t.col0, t.cols, seed).ravel() for t in fragment.tiles]
    )
