"""The codec's building blocks: bit streams coded by numpy all at once, gaps between positions, 16-bit floats.

Whatever is unpacked is checked to be the one spelling that packing would have written; WireError says what is not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braniac.protocol import limits
from braniac.protocol.errors import Refusal, WireError

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]

_MANTISSA_BITS = 11
_MANTISSA_MAX = (1 << _MANTISSA_BITS) - 1
_EXPONENT_MAX = limits.FRACTION_BITS + 4 - _MANTISSA_BITS  # the largest level stays below LEVEL_MAX


def to_float16(value: Int64Array) -> NDArray[np.uint16]:
    """Nearest 16-bit float (exponent << 11 | mantissa) of non-negative integers."""
    length = np.frexp(value.astype(np.float64))[1]  # bit length, exact below 2**53
    exponent = np.clip(length - _MANTISSA_BITS, 0, _EXPONENT_MAX)
    half = np.where(exponent > 0, np.left_shift(1, np.maximum(exponent - 1, 0)), 0)
    mantissa = (value + half) >> exponent
    overflow = mantissa > _MANTISSA_MAX
    exponent = np.where(overflow, exponent + 1, exponent)
    mantissa = np.where(overflow, (value + np.left_shift(1, np.maximum(exponent - 1, 0))) >> exponent, mantissa)
    too_big = exponent > _EXPONENT_MAX
    exponent, mantissa = np.where(too_big, _EXPONENT_MAX, exponent), np.where(too_big, _MANTISSA_MAX, mantissa)
    return ((exponent << _MANTISSA_BITS) | mantissa).astype(np.uint16)


def level_values(levels: NDArray[np.uint16]) -> Int64Array:
    """Integers of 16-bit floats. Raises WireError on one that has a second spelling or is out of range."""
    exponent = levels.astype(np.int64) >> _MANTISSA_BITS
    mantissa = levels.astype(np.int64) & _MANTISSA_MAX
    if np.any(exponent > _EXPONENT_MAX) or np.any((exponent > 0) & (mantissa <= _MANTISSA_MAX >> 1)):
        raise WireError(Refusal.WRONG_SHAPE, "a level that is out of range or not in its shortest form")
    value: Int64Array = mantissa << exponent
    return value


def gaps(within: Int64Array, tile: Int64Array) -> Int64Array:
    """Distance to the previous position in the same tile, less one; the position itself for the first."""
    gaps = within.copy()
    same = tile[1:] == tile[:-1]
    gaps[1:] -= np.where(same, within[:-1] + 1, 0)
    return gaps


def positions(gaps: Int64Array, counts: Int64Array, tile: Int64Array) -> Int64Array:
    """Inverse of `gaps`: positions within their tiles."""
    running = np.cumsum(gaps + 1)
    before = np.concatenate([np.zeros(1, np.int64), running])[np.cumsum(counts) - counts]
    within: Int64Array = running - before[tile] - 1
    return within


def best_rice(gaps: Int64Array) -> int:
    """The Rice parameter that makes the gaps shortest."""
    rice, bits = 0, int(gaps.sum())
    # The cost is convex: each further halving saves less than the one before, and costs a bit per gap.
    while (
        rice < limits.RICE_PARAMETER_MAX and (shorter := int((gaps >> rice + 1).sum()) + (rice + 1) * len(gaps)) < bits
    ):
        rice, bits = rice + 1, shorter
    return rice


def bytes_of_bits(bits: int) -> int:
    return (bits + 7) // 8


def take(data: memoryview, at: int, length: int) -> memoryview:
    if len(data) < at + length:
        raise WireError(Refusal.WRONG_SHAPE, "a payload shorter than its header says")
    return data[at : at + length]


def pack_unary(quotients: Int64Array) -> bytes:
    bits = np.zeros(int(quotients.sum()) + len(quotients), np.uint8)
    bits[np.cumsum(quotients + 1) - 1] = 1
    return np.packbits(bits).tobytes()


def unpack_unary(data: memoryview, n: int) -> Int64Array:
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8)).view(bool))  # quicker among booleans
    if len(ends) != n or (n == 0 and len(data)) or (n and int(ends[-1]) < 8 * (len(data) - 1)):
        raise WireError(Refusal.WRONG_SHAPE, "the gap stream does not hold exactly one gap per value")
    return np.diff(ends, prepend=-1) - 1


def pack_bits(values: Int64Array, width: int) -> bytes:
    """`width` bits of each value, at most 16."""
    if width == 0:
        return b""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(-1, 16)
    return np.packbits(bits[:, 16 - width :]).tobytes()


def unpack_bits(data: memoryview, n: int, width: int) -> Int64Array:
    if width == 0:
        return np.zeros(n, np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if np.any(bits[n * width :]):
        raise WireError(Refusal.WRONG_SHAPE, "the padding of a bit stream is not zero")
    padded = np.zeros((n, 16), np.uint8)
    padded[:, 16 - width :] = bits[: n * width].reshape(n, width)
    return np.packbits(padded).view(">u2").astype(np.int64)
