"""What a fuzz target is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Run = Callable[[bytes], bool]
"""Feeds one input to a decoder and checks what came out; whether the decoder took it. Any exception is a finding."""


@dataclass(frozen=True)
class Target:
    """One decoder."""

    run: Run
    seeds: Callable[[], Iterable[bytes]]
    """Inputs to begin with, the same bytes on every machine. The first must be taken."""
    bytes_max: int = 4096
    """Longer inputs are not tried."""
