"""Is this contribution admissible, and how loudly may it speak?

Exact decoding (codec.py) already refuses whatever is misshapen; what is left is direction and loudness.

* Whoever says the same as others do shares one voice with them, so that copies count once.
* Whoever contradicts most of the others far more than they contradict each other is left out.
* Norms above the median are scaled down to it (Templar's compress.py does so; here in integers).

All of it is integers, because a float norm differs between thread counts and would split the swarm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from braniac.protocol import limits
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.tiles import Sparse

_WEIGHT_ONE = 256  # the weight of a contribution with the median number of tokens
_BLOCK_SIGNS = 1 << 22  # compared at a time, 16 MiB; float32 holds every sum of so many signs exactly


@dataclass(frozen=True)
class Comparison:
    """How n contributions to one fragment relate, each to each. Both are [n, n] int64 and symmetric."""

    both: Int64Array
    """Coordinates that both sent; on the diagonal those that one sent."""
    balance: Int64Array
    """Of these, how many have the same sign in both, less how many have not."""

    def only(self, kept: Sequence[int]) -> Comparison:
        """The same of some of the contributions."""
        return Comparison(self.both[np.ix_(kept, kept)], self.balance[np.ix_(kept, kept)])

    def voices(self) -> list[int]:
        """With how many, itself included, each contribution shares a voice: same signs in at least 3/4 of its values.

        More than half of all that say the same are no copies: they agree, and have a voice each.
        """
        twice_same = self.both + self.balance
        alike = (2 * twice_same >= 3 * np.diag(self.both)[:, None]).sum(axis=1)
        return [1 if 2 * sharers > len(alike) else sharers for sharers in alike.tolist()]

    def opposed(self, margin_percent: int) -> list[int]:
        """Which contributions are at odds with most others, always fewer than half; none if `margin_percent` is 0.

        Two contributions agree by `balance` / `both`, from -1 to 1. What counts of one is its median agreement with the
        others, less that of the median contribution: honest ones may all contradict each other a little, because what
        they agree on is merged first. Below -margin, by twice what chance makes of so few coordinates, it is opposed.
        """
        count = len(self.both)
        if count < 3 or not margin_percent:
            return []
        agreement = (self.balance * limits.CLIP_ONE) // np.maximum(self.both, 1)
        middle = (count - 1) // 2  # of the others; colluders short of a majority are not it
        others = ~np.eye(count, dtype=bool)
        score = np.sort(agreement[others].reshape(count, -1), axis=1)[:, middle]
        shared = np.sort(self.both[others].reshape(count, -1), axis=1)[:, middle]
        behind = int(np.sort(score)[count // 2]) - score
        margin = limits.CLIP_ONE * margin_percent // 100
        bound = [margin + 2 * limits.CLIP_ONE // max(1, math.isqrt(n)) for n in shared.tolist()]
        found = [n for n in range(count) if behind[n] > bound[n]]
        return sorted(sorted(found, key=lambda n: (-behind[n], n))[:middle])


def compare(size: int, contributions: Sequence[Sparse]) -> Comparison:
    """Compare each two contributions to a fragment of `size` values."""
    count = len(contributions)
    both, balance = np.zeros((2, count, count), np.int64)
    step = _BLOCK_SIGNS // max(1, count)
    for start in range(0, size, step):
        signs = np.zeros((count, min(step, size - start)), np.float32)
        for row, contribution in zip(signs, contributions, strict=True):
            first, last = np.searchsorted(contribution.positions, (start, start + len(row)))
            row[contribution.positions[first:last] - start] = np.sign(contribution.values[first:last])
        balance += (signs @ signs.T).astype(np.int64)
        np.abs(signs, out=signs)
        both += (signs @ signs.T).astype(np.int64)
    return Comparison(both, balance)


def integer_norm(contribution: Sparse) -> int:
    """Euclidean norm in fixed-point units, rounded down; exact for any number of values."""
    squares = contribution.values.astype(np.int64) ** 2
    # Below 2**48 each, so 4096 of them stay inside int64; python's integers take the rest.
    partial = np.add.reduceat(squares, np.arange(0, len(squares), 4096)) if len(squares) else squares
    return math.isqrt(sum(partial.tolist()))


def median(values: Sequence[int]) -> int:
    """Median of integers; the mean of the middle two, rounded down, for an even count."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2


def clip_factors(norms: Sequence[int]) -> list[int]:
    """One 16-bit fraction per contribution: norms above the median are scaled to it, others keep CLIP_ONE.

    The bound is at most twice the lower of the middle two: else one of two could be as loud as it likes.
    """
    if not norms:
        return []
    bound = min(median(norms), 2 * sorted(norms)[(len(norms) - 1) // 2])
    return [limits.CLIP_ONE if norm <= bound else bound * limits.CLIP_ONE // norm for norm in norms]


def scaled_weights(tokens: Sequence[int], voices: Sequence[int], cap: int) -> list[int]:
    """Declared tokens as integer weights: the median is 256, more than `cap` medians do not count, copies share one."""
    middle = max(1, median(tokens)) if tokens else 1
    capped = [min(_WEIGHT_ONE * cap, _WEIGHT_ONE * count // middle) for count in tokens]
    return [max(1, weight // sharers) for weight, sharers in zip(capped, voices, strict=True)]


def clip(contribution: Sparse, factor: int) -> Int64Array:
    """[n] int64 levels scaled by `factor` / CLIP_ONE, rounded half away from zero."""
    values = contribution.values.astype(np.int64)
    if factor == limits.CLIP_ONE:
        return values
    clipped: Int64Array = np.sign(values) * ((np.abs(values) * factor + limits.CLIP_ONE // 2) // limits.CLIP_ONE)
    return clipped
