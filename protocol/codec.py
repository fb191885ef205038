"""The contribution codec: top-k per tile, few-bit levels in int32 fixed point, Rice-coded index gaps.

One format serves both ways: peers send `encode_topk(residual)` up, owners send the merged update down. A payload is a
function of integers only, so no NaN can be expressed, and its decoder accepts exactly one length.

    u8  format (3)      u8  magnitude bits m     u8  Rice parameter r     u8  flags
    u32 values n                                 flags: bit 0: per-tile counts follow; the others: turns - 1
    [u16 count of each tile]                     absent when every tile holds exactly its k values times the turns
    u16 level[tables with values][2**m]          a 16-bit float without sign: 5 bits exponent, 11 bits mantissa
    unary part of all n gaps                     q zeros and a one each, padded with zeros to a byte
    n x r bits                                   low part of the gaps
    n x (1 + m) bits                             sign, then the index of the level

Tiles with few values share a table of levels with their neighbours: eight tiles of 64 values, as one table for each
would add half a bit to every value. Three separate bit streams instead of one interleaved stream let numpy code all
values at once. Gaps between increasing positions make duplicates and disorder impossible to write down. Whoever missed
turns may send the values of several at once; no payload claims more turns than its values need. After SparseLoCo (2-bit
top-k, templar's compress.py) and Golomb-Rice coding of the gaps (Sattler et al. 2019, Sparse Binary Compression).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from braniac.protocol import bitpack, limits
from braniac.protocol.bitpack import Int32Array, Int64Array
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.tiles import Sparse, TileLayout, counts_of, select_topk

_HEADER = struct.Struct("<BBBBI")
_FORMAT = 3
_HAS_COUNTS = 1
_TURNS_SHIFT = 1
_LEVEL_BITS = limits.LEVEL_MAX.bit_length()
_TABLE_VALUES = 512
_TABLE_TILES_MAX = 8


@dataclass(frozen=True)
class CodecRules:
    """Which payloads are legal in one direction."""

    per_tile: int
    """Values kept of a 4096-value tile."""
    magnitude_bits: int
    """log2 of the number of magnitudes a tile may use; a value costs one bit more, for its sign."""
    turns: int = 1
    """How many turns' values one payload may hold: those that its sender missed, and this one."""

    def __post_init__(self) -> None:
        assert 0 < self.per_tile <= limits.TILE_SIZE_MAX
        assert 0 < self.magnitude_bits <= limits.MAGNITUDE_BITS_MAX
        assert 0 < self.turns <= limits.TURNS_MAX

    def turns_after(self, missed: int) -> int:
        """How many turns' values to send after so many misses in a row: those of the missed turns too, up to `turns`.

        After as many misses it begins anew: a link that is too slow for more still gets the usual payload through.
        """
        return 1 + missed % self.turns

    @property
    def table_tiles(self) -> int:
        """How many neighbouring tiles share a table of levels: as many as have 512 values together, at most eight."""
        return min(_TABLE_TILES_MAX, max(1, _TABLE_VALUES // self.per_tile))


def encode_topk(
    layout: TileLayout, rules: CodecRules, vector: Int32Array | Int64Array, turns: int = 1
) -> tuple[bytes, Sparse]:
    """Compress `vector` [size]: the payload, and exactly what a receiver decodes from it."""
    assert 0 < turns <= rules.turns
    return encode(layout, rules, select_topk(layout, vector, rules.per_tile * turns))


def encode(layout: TileLayout, rules: CodecRules, chosen: Sparse) -> tuple[bytes, Sparse]:
    """Quantise and pack `chosen`, which must respect the capacity of each tile."""
    m, n = rules.magnitude_bits, len(chosen)
    starts, counts = layout.tile_starts(), counts_of(layout, chosen.positions)
    turns = _turns(layout, rules, counts)
    assert turns <= rules.turns, "more values in a tile than its capacity"
    tile = np.repeat(np.arange(layout.tiles), counts)
    table, tables = _tables(counts, rules)
    magnitude = np.abs(chosen.values.astype(np.int64))
    code, levels = _quantise(table, magnitude, tables, m)
    gaps = bitpack.gaps(chosen.positions - starts[tile], tile)
    rice = bitpack.best_rice(gaps)

    full = bool(np.array_equal(counts, layout.capacity(rules.per_tile * turns)))
    parts = [_HEADER.pack(_FORMAT, m, rice, (turns - 1) << _TURNS_SHIFT | (0 if full else _HAS_COUNTS), n)]
    if not full:
        parts.append(counts.astype("<u2").tobytes())
    parts.append(levels.astype("<u2").tobytes())
    parts.append(bitpack.pack_unary(gaps >> rice))
    parts.append(bitpack.pack_bits(gaps & ((1 << rice) - 1), rice))
    negative = (chosen.values < 0).astype(np.int64)
    parts.append(bitpack.pack_bits((negative << m) | code, 1 + m))
    values = bitpack.level_values(levels)[table, code] * np.where(negative, -1, 1)
    return b"".join(parts), Sparse(chosen.positions, values.astype(np.int32))


def decode(layout: TileLayout, rules: CodecRules, payload: bytes | memoryview) -> Sparse:
    """Inverse of `encode`. Raises WireError for anything that does not fit the layout and the rules exactly."""
    data = memoryview(payload)
    if len(data) < _HEADER.size:
        raise WireError(Refusal.WRONG_SHAPE, f"a payload of {len(data)} bytes has no header")
    kind, m, rice, flags, n = _HEADER.unpack_from(data)
    turns = 1 + (flags >> _TURNS_SHIFT)
    if kind != _FORMAT or m != rules.magnitude_bits or rice > limits.RICE_PARAMETER_MAX or turns > rules.turns:
        raise WireError(Refusal.WRONG_SHAPE, "a payload header of another format")
    capacity = layout.capacity(rules.per_tile * turns)
    if n > int(capacity.sum()):
        raise WireError(Refusal.WRONG_SHAPE, f"{n} values do not fit the fragment")
    at = _HEADER.size
    counts = capacity
    if flags & _HAS_COUNTS:
        raw = bitpack.take(data, at, 2 * layout.tiles)
        at += len(raw)
        counts = np.frombuffer(raw, "<u2").astype(np.int64)
        if np.any(counts > capacity) or np.array_equal(counts, capacity):
            raise WireError(Refusal.WRONG_SHAPE, "a count exceeds its tile, or counts were not needed")
    if _turns(layout, rules, counts) != turns:
        raise WireError(Refusal.WRONG_SHAPE, "no more values than fewer turns have")
    if int(counts.sum()) != n:
        raise WireError(Refusal.WRONG_SHAPE, "the counts do not add up to the number of values")
    table, tables = _tables(counts, rules)
    raw = bitpack.take(data, at, tables * 2 << m)
    at += len(raw)
    levels = bitpack.level_values(np.frombuffer(raw, "<u2").reshape(tables, 1 << m))
    tail = len(data) - at - bitpack.bytes_of_bits(n * rice) - bitpack.bytes_of_bits(n * (1 + m))
    if tail < 0:
        raise WireError(Refusal.WRONG_SHAPE, "a payload shorter than its header says")
    high = bitpack.unpack_unary(data[at : at + tail], n)
    at += tail
    low = bitpack.unpack_bits(data[at : at + bitpack.bytes_of_bits(n * rice)], n, rice)
    at += bitpack.bytes_of_bits(n * rice)
    codes = bitpack.unpack_bits(data[at:], n, 1 + m)

    tile = np.repeat(np.arange(layout.tiles), counts)
    within = bitpack.positions((high << rice) | low, counts, tile)
    if np.any(within >= layout.tile_sizes()[tile]):
        raise WireError(Refusal.WRONG_SHAPE, "a position lies outside its tile")
    magnitude = levels[table, codes & ((1 << m) - 1)]
    if np.any(magnitude == 0):
        raise WireError(Refusal.WRONG_SHAPE, "a value uses an empty level")
    values = np.where(codes >> m, -magnitude, magnitude).astype(np.int32)
    return Sparse(layout.tile_starts()[tile] + within, values)


def tables_max(layout: TileLayout, rules: CodecRules) -> int:
    """Tables of levels in a payload that has values in every tile."""
    return -(-layout.tiles // rules.table_tiles)


def payload_bytes_max(layout: TileLayout, rules: CodecRules) -> int:
    """No legal payload of this fragment is longer."""
    n = int(layout.capacity(rules.per_tile * rules.turns).sum())
    levels = tables_max(layout, rules) * 2 << rules.magnitude_bits
    bits = n * (1 + limits.RICE_PARAMETER_MAX) + layout.size + n * (1 + rules.magnitude_bits)
    return _HEADER.size + 2 * layout.tiles + levels + bits // 8 + 3


def _turns(layout: TileLayout, rules: CodecRules, counts: Int64Array) -> int:
    """The smallest number of turns whose capacity these counts [tiles] respect; one too many if there is none."""
    for turns in range(1, rules.turns + 1):
        if np.all(counts <= layout.capacity(rules.per_tile * turns)):
            return turns
    return rules.turns + 1


def _tables(counts: Int64Array, rules: CodecRules) -> tuple[Int64Array, int]:
    """Which table of levels each value [n] uses, and how many there are: none for neighbours without any value."""
    table = np.repeat(np.arange(len(counts)) // rules.table_tiles, counts)
    fresh = np.diff(table, prepend=-1) != 0
    return np.cumsum(fresh) - 1, int(fresh.sum())


def _quantise(row: Int64Array, magnitude: Int64Array, rows: int, bits: int) -> tuple[Int64Array, NDArray[np.uint16]]:
    """Split each row's magnitudes at their mean, `bits` times: (code [n], levels [rows, 2**bits] as 16-bit floats).

    A row with no more distinct magnitudes than levels keeps them all, so what was decoded once is encoded again
    without loss, and the merge of one contribution is that contribution.
    """
    code = np.zeros(len(row), np.int64)
    for depth in range(bits):
        group = (row << depth) | code
        count, total = _group_sums(group, magnitude, rows << depth)
        mean = -(-total // np.maximum(count, 1))
        code = (code << 1) | (magnitude >= mean[group])
    code = _rank_where_few(row, magnitude, rows, bits, code)
    count, total = _group_sums((row << bits) | code, magnitude, rows << bits)
    mean = (2 * total + count) // np.maximum(2 * count, 1)
    return code, bitpack.to_float16(mean).reshape(rows, 1 << bits)


def _rank_where_few(row: Int64Array, magnitude: Int64Array, rows: int, bits: int, code: Int64Array) -> Int64Array:
    """`code` [n], but in rows with at most 2**bits distinct magnitudes how many of those are smaller."""
    # Where every level is used there are at least 2**bits distinct magnitudes, and with no more the code is the rank.
    unused = np.bincount((row << bits) | code, minlength=rows << bits).reshape(rows, 1 << bits) == 0
    at = np.flatnonzero(unused.any(axis=1)[row])
    distinct, which = np.unique((row[at] << _LEVEL_BITS) | magnitude[at], return_inverse=True)
    row_of = distinct >> _LEVEL_BITS
    rank = which - np.searchsorted(row_of, row_of)[which]
    few = np.bincount(row_of, minlength=rows)[row[at]] <= 1 << bits
    code[at[few]] = rank[few]
    return code


def _group_sums(group: Int64Array, magnitude: Int64Array, groups: int) -> tuple[Int64Array, Int64Array]:
    """Count and sum per group. Float64 sums are exact here: at most 4096 values of 24 bits."""
    count = np.bincount(group, minlength=groups)
    total = np.bincount(group, weights=magnitude, minlength=groups)
    return count, total.astype(np.int64)
