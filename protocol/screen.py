"""Is this contribution admissible, and how loudly may it speak?

Exact decoding (codec.py) already refuses whatever is misshapen; what is left is loudness. Norms are computed from the
integer levels, exactly, because a float norm differs between thread counts and would split the swarm; each
contribution above the median is scaled down to it (Templar's compress.py clips to the median norm; here in integers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from braniac.protocol import limits
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.codec import Sparse


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
    """One 16-bit fraction per contribution: norms above the median are scaled to it, others keep CLIP_ONE."""
    if not norms:
        return []
    bound = median(norms)
    return [limits.CLIP_ONE if norm <= bound else bound * limits.CLIP_ONE // norm for norm in norms]


def scaled_weights(tokens: Sequence[int], cap: int) -> list[int]:
    """Declared tokens as integer weights with the median at 256, at least 1 and at most `cap` medians."""
    middle = max(1, median(tokens)) if tokens else 1
    return [max(1, min(256 * cap, 256 * count // middle)) for count in tokens]


def clip(contribution: Sparse, factor: int) -> Int64Array:
    """[n] int64 levels scaled by `factor` / CLIP_ONE, rounded half away from zero."""
    values = contribution.values.astype(np.int64)
    if factor == limits.CLIP_ONE:
        return values
    clipped: Int64Array = np.sign(values) * ((np.abs(values) * factor + limits.CLIP_ONE // 2) // limits.CLIP_ONE)
    return clipped
