"""Curves and bars of characters: Braille dots and blocks, or plain ASCII where a terminal has nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of U+2800, by column and row from the top


def plot(values: Sequence[float], columns: int, rows: int, ascii_only: bool = False) -> list[str]:
    """A curve in `rows` lines of at most `columns` characters, highest value in the first line.

    More values than points are averaged; values that are not finite count as the last finite one.
    """
    across, up = (1, 1) if ascii_only else (2, 4)
    points = _heights(_thinned(_finite(values), columns * across), rows * up)
    if ascii_only:
        return ["".join("*" if rows - 1 - height == row else " " for height in points).rstrip() for row in range(rows)]
    cells = [[0] * ((len(points) + 1) // 2) for _ in range(rows)]
    for place, height in enumerate(points):
        from_top = rows * up - 1 - height
        cells[from_top // up][place // across] |= _DOTS[place % across][from_top % up]
    return ["".join(chr(0x2800 + dots) if dots else " " for dots in line).rstrip() for line in cells]


def bar(share: float, columns: int, ascii_only: bool = False) -> str:
    """A bar of `columns` characters of which `share` is filled."""
    filled = round(max(0.0, min(1.0, share)) * max(0, columns))
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    return full * filled + empty * (columns - filled)


def _finite(values: Sequence[float]) -> list[float]:
    kept: list[float] = []
    for value in values:
        if abs(value) < float("inf"):
            kept.append(value)
        elif kept:
            kept.append(kept[-1])
    return kept


def _thinned(values: list[float], most: int) -> list[float]:
    """At most `most` values, each the mean of its neighbours."""
    if len(values) <= most:
        return values
    edges = [place * len(values) // most for place in range(most + 1)]
    return [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]


def _heights(values: list[float], steps: int) -> list[int]:
    """Each value's place between the lowest, 0, and the highest, steps - 1; in the middle if all are equal."""
    if not values:
        return []
    low, high = min(values), max(values)
    if high <= low:
        return [(steps - 1) // 2] * len(values)
    return [round((value - low) / (high - low) * (steps - 1)) for value in values]
